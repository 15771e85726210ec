"""An OpenVINO IR holds every zero, and a zero that was lost is seen."""

import sys

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as ops
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.quantization import sparsify_and_quantize
from fx_sparsity.quantization.pt2e import default_quantizer
from fx_sparsity.storage import export_onnx
from fx_sparsity.verification import read_weights
from fx_sparsity.verification.openvino_file import OpenVinoError

INPUTS = (torch.arange(6).view(2, 3),)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, tokens):
        return self.layer(self.table(tokens))


@pytest.fixture(scope="module", params=["float", "int8"])
def file(request, tmp_path_factory):
    """(path of the IR, record, what torch gives)."""
    torch.manual_seed(0)
    folder, sparsifier = tmp_path_factory.mktemp("ir"), fxs.WeightNormSparsifier()
    if request.param == "float":
        model = fxs.prepare(Tagger().eval(), sparsifier, INPUTS, "2:4")
        sparsifier.step()
        model, record = fxs.squash(model, sparsifier)
        converted = openvino.convert_model(model, example_input=INPUTS)
    else:
        model, verification = sparsify_and_quantize(
            *(Tagger().eval(), sparsifier, INPUTS),
            order="sparsify_first",
            backend="pt2e",
            mapping="2:4",
            config=default_quantizer(dynamic=False),
        )
        export_onnx(model, INPUTS, folder / "m.onnx")
        converted, record = openvino.convert_model(folder / "m.onnx"), verification.record
    openvino.save_model(converted, folder / "m.xml")
    return folder / "m.xml", record, model(*INPUTS).detach().numpy()


def test_every_zero_is_in_the_file(file):
    path, record, expected = file
    verification = fxs.verify(path, record).raise_if_lost()
    assert [row.share for row in verification] == [1.0, 1.0]
    kinds = {row.dtype for row in verification}
    assert kinds in ({"float16"}, {"uint8", "int8"})  # as `save_model` does by default
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.abs(compiled([INPUTS[0].numpy()])[0] - expected).max() < 1e-2


def test_a_lost_zero_is_seen(file, tmp_path):
    path, record, _ = file
    for stored in (weight for weight in read_weights(path) if weight.fqn in record):
        held = bytearray(path.with_suffix(".bin").read_bytes())
        start = held.index(stored.data.numpy().tobytes())
        place = int(stored.zeros().flatten().nonzero()[0]) * stored.data.itemsize
        held[start + place] ^= 1
        (tmp_path / "b.xml").write_bytes(path.read_bytes())
        (tmp_path / "b.bin").write_bytes(held)
        (row,) = (r for r in fxs.verify(tmp_path / "b.xml", record) if r.faults)
        assert row.fqn == stored.fqn
        assert f"1 of {row.wanted} zeros lost" in row.faults


def written(path, result):
    """An IR of one input, `result` of it."""
    x = ops.parameter([1, 4], np.float32)
    openvino.save_model(openvino.Model([result(x)], [x]), path, compress_to_fp16=False)
    return read_weights(path)


def constant(values, name):
    made = ops.constant(np.array(values))
    made.set_friendly_name(name)
    return made


def test_weights_of_one_name_are_all_read(tmp_path):
    one, other = (np.full((4, 4), value, np.float32) for value in (1, 2))

    def result(x):
        x = ops.matmul(x, constant(one, "w"), False, True)
        return ops.matmul(x, constant(other, "w"), False, True)

    found = written(tmp_path / "m.xml", result)
    assert sorted(float(weight.data.sum()) for weight in found) == [16, 32]


@pytest.mark.parametrize(
    "steps",
    [
        [(ops.multiply, 0.5), (ops.subtract, 2.0)],
        [(ops.subtract, 0.0), (ops.subtract, 2.0), (ops.multiply, 0.5)],
    ],
)
def test_codes_that_mean_something_else(tmp_path, steps):
    def result(x):
        value = ops.convert(constant(np.eye(4, dtype=np.int8), "w"), np.float32)
        for step, other in steps:
            value = step(value, ops.constant(np.float32(other)))
        return ops.matmul(x, value, False, True)

    (weight,) = written(tmp_path / "m.xml", result)
    assert weight.obstacle == "its codes are not subtracted from once, then scaled"


def test_of_another_model_and_none_at_all(file, tmp_path, monkeypatch):
    path, record, _ = file
    other = fxs.prepare(
        nn.Linear(8, 4), sparsifier := fxs.WeightNormSparsifier(), (torch.randn(1, 8),), "2:4"
    )
    sparsifier.step()
    _, record = fxs.squash(other, sparsifier)
    with pytest.raises(fxs.FxSparsityError, match="such as weight, is found in the model"):
        fxs.verify(path, record).raise_if_lost()
    (tmp_path / "text.xml").write_text("no such thing")
    with pytest.raises(OpenVinoError, match=r"text.xml: no OpenVINO IR: "):
        fxs.verify(tmp_path / "text.xml")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(OpenVinoError, match=r"pip install 'fx_sparsity\[openvino\]'"):
        fxs.verify(path)
