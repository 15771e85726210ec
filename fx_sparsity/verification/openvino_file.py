"""What an OpenVINO IR stores: constants, and codes with what is subtracted and multiplied."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.verification.stored import StoredWeight, float_weight

_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "u8": torch.uint8,
}
"""What a weight may be stored in, as OpenVINO calls it; f64 and four bits are not read."""
_STEPS = {"Subtract": "zero_point", "Multiply": "scale"}
"""Operator on codes -> what its other argument is."""
_ORDERS = (["Multiply"], ["Multiply", "Subtract"])
"""In which order they may be met, from the result back to the codes."""


class OpenVinoError(FxSparsityError, ValueError):
    """A file that cannot be read as an OpenVINO IR, or the package for it is missing."""


def read_openvino(path: str | Path) -> Iterator[StoredWeight]:
    """Every constant of two or more dimensions that an operator of an OpenVINO IR reads.

    A weight has the name that it had in the ONNX file or module which was converted. A linear layer
    in float that came from an ONNX file has lost it. Weights in another dtype than 8-bit codes and
    floats of up to 32 bits are left out. Nothing that is read can be written.

    Args:
        path: of the `.xml`; the `.bin` lies beside it.

    Raises:
        OpenVinoError: the package openvino is missing, or the file cannot be read.
    """
    try:
        import openvino
    except ImportError as error:
        raise OpenVinoError(f"{path}: pip install 'fx_sparsity[openvino]' to read it") from error
    try:
        model = openvino.Core().read_model(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OpenVinoError(f"{path}: no OpenVINO IR: {reason}") from error
    seen = set()
    for node in model.get_ops():
        if node.get_type_name() in ("Convert", *_STEPS):
            continue
        for value in node.input_values():
            made_of, weight = _stored(value.get_node())
            if weight is not None and made_of not in seen:
                seen.add(made_of)
                yield weight


def _stored(node: Any) -> tuple[tuple[str, ...], StoredWeight | None]:
    """The weight that an operator's input shows, after the names of the constants it is made of.

    Those names are unique, as those that a file gives are not. None where it is computed otherwise.
    """
    chain = [node]
    while chain[-1].get_type_name() in ("Convert", *_STEPS):
        chain.append(chain[-1].input_value(0).get_node())
    steps = [one for one in chain if one.get_type_name() in _STEPS]
    made_of = (chain[-1], *(one.input_value(1).get_node() for one in steps))
    return tuple(one.get_name() for one in made_of), _weight(node)


def _weight(node: Any) -> StoredWeight | None:
    parameters: dict[str, Tensor] = {}
    order = []
    while (kind := node.get_type_name()) != "Constant":
        if kind in _STEPS:
            order.append(kind)
            parameter = _constant(node.input_value(1).get_node())
            if parameter is None:
                return None
            parameters[_STEPS[kind]] = parameter
        elif kind != "Convert":
            return None
        node = node.input_value(0).get_node()
    data = _constant(node)
    if data is None or data.ndim < 2:
        return None
    where = node.get_friendly_name()
    fqn = where.removeprefix("self.").removesuffix("_compressed")
    if data.is_floating_point():
        return None if parameters else replace(float_weight(fqn, where, data), write=_refuse)
    if "scale" not in parameters:
        return None
    scale, zero_point = parameters["scale"], parameters.get("zero_point", data.new_zeros(()))
    limits = torch.iinfo(data.dtype)
    return StoredWeight(
        fqn,
        where,
        str(data.dtype).removeprefix("torch."),
        _scheme(scale),
        data,
        _refuse,
        scale,
        zero_point,
        (limits.min, limits.max),
        obstacle="" if order in _ORDERS else "its codes are not subtracted from once, then scaled",
    )


def _constant(node: Any) -> Tensor | None:
    """What a constant holds, converted or not; None for anything else, and for other dtypes."""
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    dtype = _DTYPES.get(node.get_element_type().get_type_name())
    return None if dtype is None else torch.from_numpy(node.data.copy()).view(dtype)


def _scheme(scale: Tensor) -> str:
    axes = [axis for axis, extent in enumerate(scale.shape) if extent > 1]
    return f"per-channel affine, axis {axes[0]}" if len(axes) == 1 else "per-tensor affine"


def _refuse(values: Tensor) -> NoReturn:
    raise OpenVinoError("an OpenVINO IR is read, not written")
