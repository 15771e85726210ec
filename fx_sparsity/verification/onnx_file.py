"""What an ONNX file stores: initializers, and codes behind `DequantizeLinear`."""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.verification.stored import StoredWeight, float_weight

_GENERATED = re.compile(r"val_\d+|_frozen_param\d+")
"""Names that an exporter, or a quantizer, made up."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Under which torch's exporter notes the modules around an operator, the outermost first."""
_PASSED = ("Transpose", "Cast", "Identity")
_WRONG = (ValueError, TypeError, LookupError, RuntimeError, SyntaxError)
"""What onnx, and what is done here, raise for files that are not as they should be."""


class OnnxError(FxSparsityError, ValueError):
    """A file that cannot be read as ONNX, or the package for it is missing."""


class _Reading(NamedTuple):
    """How an operator gets at an initializer.

    Attributes:
        name: of the initializer.
        dequantize: the node that codes go through; None where it holds floats.
        transposed: whether an odd number of transpositions is on the way.
        turns: those between `dequantize` and its codes, the nearest to it first.
    """

    name: str
    dequantize: Any
    transposed: bool
    turns: tuple[Any, ...]


def read_onnx(path: str | Path) -> Iterator[StoredWeight]:
    """Every initializer of two or more dimensions that an operator of an ONNX file reads.

    A weight has the name of its initializer. Where the exporter made one up, as for a linear layer
    whose weight it transposed, it has that of the layer's module, as `torch.onnx.export` notes it.
    Whatever is computed from an initializer by other operators than transpositions, casts and
    `DequantizeLinear` is not looked into. Nothing that is read can be written.

    Raises:
        FileNotFoundError: there is none.
        OnnxError: the package onnx is missing, or the file cannot be read.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise OnnxError(f"{path}: pip install 'fx_sparsity[onnx]' to read it") from error
    try:
        yield from _weights(onnx.load(path).graph)
    except DecodeError as error:
        raise OnnxError(f"{path}: no ONNX file: {error}") from error
    except (*_WRONG, onnx.checker.ValidationError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OnnxError(f"{path}: cannot be read: {reason}") from error


def _weights(graph: Any) -> Iterator[StoredWeight]:
    """See `read_onnx`."""
    held = {initializer.name: initializer for initializer in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    seen: set[tuple[str, ...]] = set()
    for node in graph.node:
        for place, value in enumerate(node.input):
            reading = _walk(value, made_by, held)
            if reading is None or len(held[reading.name].dims) < 2 or node.op_type in _PASSED:
                continue
            if node.op_type == "DequantizeLinear" or _is_boolean(held[reading.name]):
                continue
            weight = _stored(reading, made_by, held)
            if _GENERATED.fullmatch(reading.name):
                weight = _of_the_module(weight, node, place, reading.transposed)
            scaled = () if reading.dequantize is None else reading.dequantize.input[1:]
            if (key := (weight.fqn, weight.where, *scaled)) not in seen:
                seen.add(key)
                yield weight


def _is_boolean(initializer: Any) -> bool:
    """Whether it selects, as masks of attention do, and is no weight."""
    from onnx import TensorProto

    return bool(initializer.data_type == TensorProto.BOOL)


def _walk(value: str, made_by: dict[str, Any], held: dict[str, Any]) -> _Reading | None:
    """From an operator's input back to the initializer that it shows; None where there is none."""
    dequantize, transposed = None, False
    turns: list[Any] = []
    while value not in held:
        node = made_by.get(value)
        if node is None or node.op_type not in (*_PASSED, "DequantizeLinear"):
            return None
        if node.op_type == "DequantizeLinear":
            dequantize = node
        if node.op_type == "Transpose":
            transposed = not transposed
            turns += [] if dequantize is None else [node]
        value = node.input[0]
    return _Reading(value, dequantize, transposed, tuple(turns))


def _stored(reading: _Reading, made_by: dict[str, Any], held: dict[str, Any]) -> StoredWeight:
    """What an initializer holds, under its own name."""
    name, node = reading.name, reading.dequantize
    tensor, dtype, codes = _tensor(held[name])
    if node is None:
        return replace(float_weight(name, name, tensor), write=_refuse)
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    axis, size = settings.get("axis", 1) % tensor.ndim, settings.get("block_size", 0)
    found = [_walk(value, made_by, held) for value in node.input[1:] if value]
    parameters = [_tensor(held[one.name])[0] for one in found if one is not None]
    turns = [_order(turn, tensor.ndim) for turn in reading.turns]
    expanded = [_along(parameter, tensor, axis, size, turns) for parameter in parameters]
    scheme = f"groups of {size}" if size else f"per-channel affine, axis {axis}"
    return StoredWeight(
        name,
        name,
        dtype,
        scheme if parameters and parameters[0].ndim else "per-tensor affine",
        tensor,
        _refuse,
        expanded[0] if expanded else None,
        # An exporter may write it in float, and cast it.
        expanded[1].to(tensor.dtype) if len(expanded) > 1 else tensor.new_zeros(()),
        codes,
        obstacle="its scales or zero points are computed" if None in found else "",
    )


def _tensor(initializer: Any) -> tuple[Tensor, str, tuple[int, int] | None]:
    """(values or codes, name of the dtype, range of codes) of an initializer."""
    from onnx import TensorProto, numpy_helper

    array = numpy_helper.to_array(initializer)
    if initializer.data_type in (TensorProto.INT4, TensorProto.UINT4):
        signed = initializer.data_type == TensorProto.INT4
        codes = torch.from_numpy(array.astype("int8" if signed else "uint8"))
        return codes, "int4" if signed else "uint4", (-8, 7) if signed else (0, 15)
    if initializer.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16), "bfloat16", None
    try:
        tensor = torch.from_numpy(array.copy())  # of what lies in the file, which is read-only
    except TypeError as error:
        raise TypeError(f"{initializer.name}: {error}") from error
    limits = None if tensor.is_floating_point() else torch.iinfo(tensor.dtype)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor, dtype, None if limits is None else (limits.min, limits.max)


def _order(turn: Any, ndim: int) -> tuple[int, ...]:
    """Which axis of what goes into a `Transpose` each axis of its result is."""
    found = [tuple(attribute.ints) for attribute in turn.attribute if attribute.name == "perm"]
    return found[0] if found else tuple(reversed(range(ndim)))


def _along(
    parameter: Tensor, codes: Tensor, axis: int, size: int, turns: Sequence[tuple[int, ...]]
) -> Tensor:
    """A scale or zero point of `DequantizeLinear`, broadcastable against the codes.

    Args:
        parameter: as it is stored.
        codes: as they are stored.
        axis: of what `DequantizeLinear` is given.
        size: of a block along that axis; 0 for none.
        turns: transpositions of the codes on their way, the last one first.
    """
    if parameter.ndim == 0:
        return parameter
    shape = list(codes.shape)
    for turn in reversed(turns):
        shape = [shape[dim] for dim in turn]
    if size:
        parameter = parameter.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    else:
        parameter = parameter.view([-1 if dim == axis else 1 for dim in range(codes.ndim)])
    for turn in turns:
        parameter = parameter.permute([turn.index(dim) for dim in range(codes.ndim)])
    parameter.expand(codes.shape)  # raises where it belongs to other codes
    return parameter


def _of_the_module(weight: StoredWeight, node: Any, place: int, transposed: bool) -> StoredWeight:
    """A weight whose initializer has a made-up name, as the module has it that computes with it."""
    noted = {entry.key: entry.value for entry in node.metadata_props}
    scopes = ast.literal_eval(noted.get(_SCOPES, "[]"))
    module = scopes[-2] if len(scopes) > 1 else ""
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    right = node.op_type == "MatMul" or (node.op_type == "Gemm" and not settings.get("transB"))
    # A linear layer has [out, in], and the right factor of its product is [in, out].
    if place == 1 and right != transposed and weight.data.ndim == 2:
        weight = replace(
            weight,
            data=weight.data.T.contiguous(),
            scale=_turned(weight.scale),
            zero_point=_turned(weight.zero_point),
        )
    return replace(weight, fqn=f"{module}.weight".removeprefix("."))


def _turned(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.ndim < 2 else parameter.T


def _refuse(values: Tensor) -> NoReturn:
    raise OnnxError("an ONNX file is read, not written")
