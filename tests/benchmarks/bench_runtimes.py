"""Sparse models in ONNX Runtime, OpenVINO and ExecuTorch: zeros in the file, outputs and times.

    python -m tests.benchmarks.bench_runtimes --write

Needs onnxruntime, openvino and executorch. Zeros are counted without fx_sparsity's readers: by onnx's
numpy_helper, by what openvino reads back, and by looking for the bytes of the codes in the `.pte`.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from onnx import numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fx_sparsity as fxs
from fx_sparsity.env import describe
from fx_sparsity.quantization import sparsify_and_quantize
from fx_sparsity.quantization.pt2e import default_quantizer
from fx_sparsity.reports import format_table
from fx_sparsity.storage import export_onnx

TABLE = Path(__file__).with_name("runtimes.txt")
TITLES = ("model", "order", "runtime", "masked", "zeros in the file", "max error", "ms", "dense ms")
UNFUSED = ["MatMulAddFusion"]
MAPPING = fxs.SparsityMapping().set_global("2:4")


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(1000, 384)
        self.mlp = nn.Sequential(nn.Linear(384, 1536), nn.ReLU(), nn.Linear(1536, 384))

    def forward(self, tokens):
        return self.mlp(self.words(tokens))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.second, self.norm2 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 16)

    def forward(self, image):
        image = torch.relu(self.norm(self.first(image)))
        return self.head(torch.relu(self.norm2(self.second(image))).mean((2, 3)))


def onnx_zeros(path):
    graph = onnx.load(path).graph
    held = {
        initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer
    }
    zero = {
        node.input[0]: held[node.input[2]].astype(np.float32)
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[2] in held
    }
    return sum(
        int((array == zero.get(name, np.zeros(1)).reshape(-1, *[1] * (array.ndim - 1))).sum())
        for name, array in held.items()
        if array.ndim > 1
    )


def openvino_zeros(path):
    count = 0
    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() != "Constant" or len(node.shape) < 2 or node.shape[-1] == 1:
            continue
        data, zero = node.data, 0
        for user in [t.get_node() for out in node.outputs() for t in out.get_target_inputs()]:
            for last in [t.get_node() for out in user.outputs() for t in out.get_target_inputs()]:
                if last.get_type_name() == "Subtract":
                    zero = last.input_value(1).get_node().input_value(0).get_node().data
        count += int((data == zero).sum())
    return count


def pte_zeros(path, model, record):
    held, count = path.read_bytes(), 0
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for fqn in record:
        tensor = tensors[fqn].detach()
        stored = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
        found = {stored.contiguous().numpy().tobytes() in held, tensor.numpy().tobytes() in held}
        count += int((tensor == 0).sum()) if True in found else 0
    return count


def milliseconds(run):
    run()
    times = []
    for _ in range(30):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def in_onnxruntime(model, inputs, path, record):
    export_onnx(model, inputs, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, disabled_optimizers=UNFUSED)
    given = {session.get_inputs()[0].name: inputs[0].numpy()}
    return onnx_zeros(path), lambda: session.run(None, given)[0]


def in_openvino(model, inputs, path, record):
    export_onnx(model, inputs, path)
    saved = path.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(path), saved, compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(saved, "CPU", settings)
    return openvino_zeros(saved), lambda: compiled([inputs[0].numpy()])[0]


def folded(model):
    """Batch norms within the convolutions before them, as XNNPACK has them, so that bytes are known."""
    if not hasattr(model, "norm2") or isinstance(model, torch.fx.GraphModule):
        return model
    model = copy.deepcopy(model)
    for conv, norm in ("first", "norm"), ("second", "norm2"):
        fused = fuse_conv_bn_eval(getattr(model, conv), getattr(model, norm))
        setattr(model, conv, fused)
        setattr(model, norm, nn.Identity())
    return model


def in_executorch(model, inputs, path, record):
    model = folded(model)
    program = torch.export.export(model, inputs)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    saved = path.with_suffix(".pte")
    saved.write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(saved).load_method("forward")
    return pte_zeros(saved, model, record), lambda: method.execute(list(inputs))[0].numpy()


RUNTIMES = {"ONNX Runtime": in_onnxruntime, "OpenVINO": in_openvino, "ExecuTorch": in_executorch}


def quantizer(runtime, order):
    if runtime == "ExecuTorch":
        config = get_symmetric_quantization_config(is_per_channel=True)
        return XNNPACKQuantizer().set_global(config)
    return default_quantizer(dynamic=order == "dynamic")


def sparse(model, inputs, order, runtime):
    """(the model in that order, its record)."""
    sparsifier = fxs.WeightNormSparsifier()
    if order == "float":
        masked = fxs.prepare(copy.deepcopy(model), sparsifier, inputs, MAPPING)
        sparsifier.step()
        return fxs.squash(masked, sparsifier)
    quantized, verification = sparsify_and_quantize(
        *(model, sparsifier, inputs),
        order="sparsify_first" if order == "dynamic" else order,
        backend="pt2e",
        mapping=MAPPING,
        config=quantizer(runtime, order),
    )
    return quantized, verification.raise_if_lost().record


def rows(folder):
    torch.manual_seed(0)
    for name, model, inputs in (
        ("tagger", Tagger().eval(), (torch.randint(1000, (1, 128)),)),
        ("cnn", Cnn().eval(), (torch.randn(4, 16, 32, 32),)),
    ):
        for runtime, place in RUNTIMES.items():
            dense = milliseconds(place(model, inputs, folder / "dense.onnx", ())[1])
            for order in ("float", "sparsify_first", "quantize_first", "dynamic"):
                if (runtime, order) == ("ExecuTorch", "dynamic"):
                    continue
                made, record = sparse(model, inputs, order, runtime)
                zeros, run = place(made, inputs, folder / "sparse.onnx", record)
                masked = sum(int((~mask.keep).sum()) for mask in record.values())
                error = np.abs(run() - made(*inputs).detach().numpy()).max()
                took = milliseconds(run)
                yield name, order, runtime, masked, zeros, f"{error:.1e}", took, dense


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_runtimes")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            [*map(str, row[:-2]), *(f"{value:.2f}" for value in row[-2:])]
            for row in rows(Path(folder))
        ]
    text = "\n".join(
        [
            "Made by: python -m tests.benchmarks.bench_runtimes --write; one thread",
            *describe().splitlines(),
            f"onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__}",
            "",
            format_table(TITLES, cells),
            "",
            "max error: next to the same model in torch. ms: median of 30. dense ms: the float model, there.",
        ]
    )
    print(text)
    if options.write:
        TABLE.write_text(text + "\n")


if __name__ == "__main__":
    main()
