"""What `export_onnx` writes is computed in integers by ONNX Runtime, and is what TensorRT takes."""

import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

import fx_sparsity as fxs
from fx_sparsity.quantization import sparsify_and_quantize
from fx_sparsity.quantization.any_use import Int8AnyUseConfig
from fx_sparsity.quantization.pt2e import default_quantizer
from fx_sparsity.storage import export_onnx
from fx_sparsity.verification.onnx_file import OnnxError

INPUTS = (torch.randn(8, 16, generator=torch.Generator().manual_seed(0)),)
BATCH = ({0: torch.export.Dim.DYNAMIC},)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def quantized(model, order="sparsify_first", mapping="2:4", inputs=INPUTS, **settings):
    config = default_quantizer(**settings)
    how = {"backend": "pt2e", "mapping": mapping, "config": config, "order": order}
    if inputs is INPUTS:
        how["dynamic_shapes"] = BATCH
    return sparsify_and_quantize(model, fxs.WeightNormSparsifier(), inputs, **how)


def session(path, folder):
    """A session, and how many nodes of which kind it runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = f"{folder}/optimized.onnx", 3
    made = onnxruntime.InferenceSession(path, options, disabled_optimizers=["MatMulAddFusion"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return made, Counter(node.op_type for node in nodes)


@pytest.mark.parametrize(
    ("order", "dynamic"), [("sparsify_first", True), ("quantize_first", False)]
)
def test_layers_run_in_integers_at_any_batch(order, dynamic, tmp_path):
    model, verification = quantized(layers(), order, dynamic=dynamic)
    export_onnx(model, INPUTS, path := tmp_path / "m.onnx", dynamic_shapes=BATCH)
    fxs.verify(path, verification.record).raise_if_lost()
    fxs.verify(path, verification.record).raise_if_lost()
    for initializer in onnx.load(path).graph.initializer:
        if len(initializer.dims) > 1:
            assert np.mean(numpy_helper.to_array(initializer) == 0) == 0.5
    runtime, nodes = session(path, tmp_path)
    assert nodes["MatMulIntegerToFloat"] == 2
    assert nodes["DynamicQuantizeLinear"] == 2 * dynamic
    for inputs in (INPUTS[0], INPUTS[0][:3]):
        (given,) = runtime.run(None, {runtime.get_inputs()[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), model(inputs), rtol=1e-3, atol=1e-2)


def test_a_convolution_runs_in_integers(tmp_path):
    inputs = (torch.randn(2, 4, 8, 8),)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    made, verification = quantized(model.eval(), inputs=inputs, dynamic=False)
    export_onnx(made, inputs, path := tmp_path / "c.onnx")
    fxs.verify(path, verification.record).raise_if_lost()
    runtime, nodes = session(path, tmp_path)
    assert nodes["QLinearConv"] >= 1
    (given,) = runtime.run(None, {runtime.get_inputs()[0].name: inputs[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(given), made(*inputs), rtol=1e-3, atol=1e-2)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, tokens):
        return self.layer(self.table(tokens))


def test_symmetric_is_what_tensorrt_takes(tmp_path):
    """int8 throughout, every zero point 0, weights per channel on axis 0, 2 kept of 4 along `in`."""
    inputs = (torch.arange(6).view(2, 3),)
    model, verification = quantized(Bag().eval(), inputs=inputs, dynamic=False, symmetric=True)
    export_onnx(model, inputs, path := tmp_path / "s.onnx")
    fxs.verify(path, verification.record).raise_if_lost()
    graph = onnx.load(path).graph
    held = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes = [node for node in graph.node if "antizeLinear" in node.op_type]
    assert len(nodes) == 4  # one activation, twice; two weights
    for node in nodes:
        zero_point = held[node.input[2]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
    weight = held["layer.weight"]
    assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    with pytest.raises(ValueError, match="symmetric: expected dynamic=False"):
        default_quantizer(symmetric=True)


def test_what_onnx_cannot_hold_is_told_in_a_line(tmp_path, monkeypatch):
    path, sparsifier = tmp_path / "m.onnx", fxs.WeightNormSparsifier()
    model = fxs.prepare(layers(), sparsifier, INPUTS, "2:4")
    with pytest.raises(OnnxError, match=r"0\.weight, 2\.weight still masked; squash before"):
        export_onnx(model, INPUTS, path)
    sparsifier.step()
    model, _ = fxs.squash(model, sparsifier)
    lowered, _ = fxs.lower(model, INPUTS, policy="always")
    with pytest.raises(OnnxError, match=r"fx_sparsity\.\w+\.default.*; unlower it first$"):
        export_onnx(lowered, INPUTS, path)
    other, _ = sparsify_and_quantize(
        layers(), fxs.WeightNormSparsifier(), INPUTS, order="sparsify_first", backend="fx"
    )
    with pytest.raises(OnnxError, match="ONNX takes those of the backend pt2e") as refused:
        export_onnx(other, INPUTS, path)
    assert "\n" not in str(refused.value)
    for config in (Int8WeightOnlyConfig(), {"0": Int8AnyUseConfig()}):
        codes, _ = sparsify_and_quantize(
            *(layers(), fxs.WeightNormSparsifier(), INPUTS),
            order="sparsify_first",
            backend="torchao",
            config=config,
        )
        with pytest.raises(OnnxError, match=r"0\.weight.*would be floats in it.*backend pt2e"):
            export_onnx(codes, INPUTS, path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(OnnxError, match=r"pip install 'fx_sparsity\[onnx\]'"):
        export_onnx(layers(), INPUTS, path)
    assert not path.exists()
