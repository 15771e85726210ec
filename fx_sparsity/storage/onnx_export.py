"""Writing ONNX files that runtimes compute in integers, with what torch's exporter lacks."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fx_sparsity.graph.example_inputs import ExampleInputs, call_arguments
from fx_sparsity.quantization.torchao_tensors import is_torchao
from fx_sparsity.sparsifier.mask import masked_weights
from fx_sparsity.storage.onnx_bags import unroll_bags
from fx_sparsity.verification import read_weights
from fx_sparsity.verification.onnx_file import OnnxError

_SUMMARY = re.compile(r"<class '(?:\w+\.)*(\w+)'>: (.+)")
"""The type and the first line of what torch's exporter stumbled over."""
_NO_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='(\S+)', overload='(\S+)'\)")
"""What torch's exporter says of an operator that it cannot write."""

_TAKEN = "of models that are quantized, ONNX takes those of the backend pt2e"


def export_onnx(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | Path,
    *,
    dynamic_shapes: Any = None,
) -> None:
    """Write a squashed model, quantized by pt2e or in float, as one ONNX file with all its zeros.

    This is `torch.onnx.export(dynamo=True)`, and three things besides. Activations that pt2e
    quantizes as they come go through `DynamicQuantizeLinear`, which torch's exporter does not
    write. A linear layer of a quantized model is `MatMul` and `Add`, whatever the dimensions of its
    input: `Gemm` would need a bias in integers, or ONNX Runtime computes it in float. Embedding
    bags of one size are lookups and sums, where torch's exporter makes a loop over bags.

    Args:
        model: not changed. Codes have the names of their weights in the file.
        example_inputs: a tuple of positional, or a dict of keyword arguments.
        path: of the file; its weights are in a second one beside it from 2 GB on.
        dynamic_shapes: as `torch.onnx.export` takes it. A model that pt2e quantized has the
            dynamic shapes that it was quantized with, and no others.

    Raises:
        OnnxError: live masks, codes of torchao, the packages onnx and onnxscript are missing, or
            an operator that ONNX does not have.

    Examples:
        >>> export_onnx(nn.Linear(8, 4).eval(), (torch.randn(2, 8),), "model.onnx")
    """
    if masked := masked_weights(model):
        raise OnnxError(f"{', '.join(masked)} still masked; squash before writing {path}")
    try:
        import onnxscript  # noqa: F401
        from onnx_ir import DataType, Shape
    except ImportError as error:
        raise OnnxError(f"{path}: pip install 'fx_sparsity[onnx]' to write it") from error
    if codes := [fqn for fqn, tensor in model.named_parameters() if is_torchao(tensor)]:
        raise OnnxError(
            f"{path}: {', '.join(codes)} hold codes of torchao, which would be floats in it; "
            f"{_TAKEN}"
        )
    args, kwargs = call_arguments(example_inputs)
    quantized = any(weight.quantized for weight in read_weights(model))
    settings: dict[str, Any] = {
        "dynamo": True,
        "verbose": False,
        "optimize": False,
        "dynamic_shapes": dynamic_shapes,
        "custom_translation_table": _translations() if quantized else {},
    }
    try:
        program = torch.onnx.export(model, args, kwargs=kwargs, **settings)
        assert program is not None
        # What the exporter traced is written again, where there were bags of one size.
        if program.exported_program is not None and unroll_bags(program.exported_program):
            program = torch.onnx.export(program.exported_program, **settings)
            assert program is not None
        program.optimize()
    except torch.onnx.OnnxExporterError as error:
        raise OnnxError(f"{path}: not written: {_reason(error)}") from error
    # The exporter notes what torch gives: scales in float64, zero points in int64, of shape [1].
    for node in program.model.graph:
        if node.op_type == "DynamicQuantizeLinear":
            for output, dtype in zip(
                node.outputs[1:], (DataType.FLOAT, DataType.UINT8), strict=True
            ):
                output.dtype, output.shape = dtype, Shape([])
    program.save(path)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator -> what it is in ONNX, instead of, or besides, what torch's exporter knows."""
    # The operators exist as soon as this was imported.
    import torch.ao.quantization.fx._decomposed
    from onnxscript import opset18 as op

    decomposed = torch.ops.quantized_decomposed

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)

    def choose(x: Any, low: int, high: int, eps: float, dtype: torch.dtype) -> Any:
        if (low, high) != (0, 255):
            raise OnnxError(
                f"activations are quantized as they come to {low}..{high}, and ONNX does that to "
                "0..255 only; quantize them to uint8, or with ranges from data"
            )
        _, scale, zero_point = op.DynamicQuantizeLinear(x)
        return scale, zero_point

    def quantize(x: Any, scale: Any, zero: Any, low: int, high: int, dtype: torch.dtype) -> Any:
        return op.QuantizeLinear(x, scale, zero)

    def dequantize(
        x: Any, scale: Any, zero: Any, low: int, high: int, dtype: torch.dtype, **_: Any
    ) -> Any:
        return op.DequantizeLinear(x, scale, zero)

    return {
        torch.ops.aten.linear.default: linear,
        decomposed.choose_qparams.tensor: choose,
        decomposed.quantize_per_tensor.tensor: quantize,
        decomposed.dequantize_per_tensor.tensor: dequantize,
    }


def _reason(error: BaseException) -> str:
    """Why torch's exporter gave up, in a line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OnnxError):
            return str(cause)
        cause = cause.__cause__
    if (operator := _NO_OPERATOR.search(str(error))) is not None:
        name = ".".join(operator.groups())
        if name.startswith("fx_sparsity"):
            return f"it has sparse kernels ({name}), which run in torch alone; unlower it first"
        return f"torch's exporter has no ONNX operator for {name}; {_TAKEN}"
    found = _SUMMARY.search(str(error))
    return f"{': '.join(found.groups()) if found else error}; {_TAKEN}"
