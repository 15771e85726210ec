"""A sparse int8 model in other runtimes: ONNX Runtime, OpenVINO and ExecuTorch.

    pip install "fx_sparsity[torchao,onnx,openvino]" onnxruntime executorch
    python examples/deploy.py

The zeros are counted in each file, and each runtime is compared with torch. One that is not
installed is left out, with a line that says so.
"""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantizer import Quantizer

import fx_sparsity as fxs
from fx_sparsity.quantization import sparsify_and_quantize
from fx_sparsity.quantization.pt2e import default_quantizer
from fx_sparsity.storage import export_onnx
from fx_sparsity.verification import Verification

INPUTS = (torch.randn(32, 64, generator=torch.Generator().manual_seed(0)),)


def sparse_int8(config: Quantizer) -> tuple[nn.Module, Verification]:
    """Two layers in 2:4 and int8, with ranges of activations from data; and their proof."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16)).eval()
    quantized, proof = sparsify_and_quantize(
        model,
        fxs.WeightNormSparsifier(),
        INPUTS,
        order="sparsify_first",
        backend="pt2e",
        mapping="2:4",
        config=config,
    )
    return quantized, proof.raise_if_lost()


def onnx_runtime(folder: Path) -> None:
    import onnxruntime

    model, proof = sparse_int8(default_quantizer(dynamic=False))
    path = folder / "model.onnx"
    export_onnx(model, INPUTS, path)
    print("ONNX:", fxs.verify(path, proof.record).raise_if_lost().summary)
    # This optimizer would make layers of floats of the int8 ones.
    session = onnxruntime.InferenceSession(path, disabled_optimizers=["MatMulAddFusion"])
    name = session.get_inputs()[0].name
    compare(session.run(None, {name: INPUTS[0].numpy()})[0], model(*INPUTS))


def open_vino(folder: Path) -> None:
    import openvino

    model, proof = sparse_int8(default_quantizer(dynamic=False))
    export_onnx(model, INPUTS, folder / "model.onnx")
    path = folder / "model.xml"
    openvino.save_model(openvino.convert_model(folder / "model.onnx"), path)
    print("OpenVINO:", fxs.verify(path, proof.record).raise_if_lost().summary)
    compiled = openvino.Core().compile_model(path, "CPU")
    compare(compiled([INPUTS[0].numpy()])[0], model(*INPUTS))


def execu_torch(folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    config = get_symmetric_quantization_config(is_per_channel=True)
    model, proof = sparse_int8(XNNPACKQuantizer().set_global(config))
    program = torch.export.export(model, INPUTS)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path = folder / "model.pte"
    path.write_bytes(lowered.to_executorch().buffer)
    # Weights have no names there, but their codes are in it, byte for byte.
    held = path.read_bytes()
    found = [model.get_buffer(row.fqn).numpy().tobytes() in held for row in proof]
    print(f"ExecuTorch: the codes of {sum(found)} of {len(found)} weights are in the file")
    method = Runtime.get().load_program(path).load_method("forward")
    compare(method.execute(list(INPUTS))[0].numpy(), model(*INPUTS))


def compare(given: np.ndarray, expected: Tensor) -> None:
    error = np.abs(given - expected.detach().numpy()).max()
    print(f"  next to torch: off by {error:.4f} at most, of {expected.abs().max():.2f}")


def main() -> None:
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for runtime in (onnx_runtime, open_vino, execu_torch):
            try:
                runtime(Path(folder))
            except ModuleNotFoundError as error:
                print(f"{runtime.__name__}: left out, since {error.name} is not installed")


if __name__ == "__main__":
    main()
