"""Follows a parameter through views, and reads its axes' roles off the strides that arrive.

The view chain (t, permute, chunk, select, ...) is replayed on a meta tensor of the parameter's
shape. Where an operator consumes the result, each of its axes has a stride, and a stride points
back at the dimension of the parameter that it walks along. One code path for packed projections,
stacked experts and transposed storage; no copy of any data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fx_sparsity.graph.operators import SAME_VALUES, Axes, is_view, operator_name
from fx_sparsity.patterns import Role


@dataclass(frozen=True)
class Origin:
    """What a node holds: a view of a parameter.

    Attributes:
        fqn: canonical name of the parameter.
        parameter: meta tensor of its shape, contiguous.
        view: the same storage as this node sees it (a sequence for split and chunk).
        dequantized: whether a dequantize operator lies between.
    """

    fqn: str
    parameter: Tensor
    view: Any
    dequantized: bool = False


def origin_of(fqn: str, tensor: Tensor) -> Origin:
    """The origin of a node that is the parameter itself."""
    meta = torch.empty(tensor.shape, device="meta", dtype=tensor.dtype)
    return Origin(fqn, meta, meta)


def follow(node: fx.Node, origins: dict[fx.Node, Origin]) -> Origin | None:
    """The origin that `node` passes on, or None where it is a consumer (or no view at all)."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = operator_name(node)
    source = node.args[1] if name == "where" and len(node.args) > 1 else node.args[0]
    if not isinstance(source, fx.Node) or source not in origins:
        return None
    origin = origins[source]
    if name in SAME_VALUES:
        quantized = origin.dequantized or name.startswith("dequantize")
        return Origin(origin.fqn, origin.parameter, origin.view, quantized)
    if not is_view(node):
        return None
    view = _replay(node, name, origin.view)
    return None if view is None else Origin(origin.fqn, origin.parameter, view, origin.dequantized)


def _replay(node: fx.Node, name: str, view: Any) -> Any:
    """Apply a view operator to a meta tensor; None where it depends on data or has to copy."""

    def value(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        known = arg.meta.get("val")
        if not isinstance(known, int | torch.SymInt):
            raise ValueError(f"argument {arg.name} is not known before running")
        return int(known)

    try:
        args = fx.map_arg((node.args[1:], node.kwargs), value)
        if name in ("T", "mT"):
            result = getattr(view, name)
        elif node.op == "call_method":
            result = getattr(view, name)(*args[0], **args[1])
        else:
            result = node.target(view, *args[0], **args[1])  # type: ignore[operator]
    except (ValueError, RuntimeError, IndexError, TypeError):
        return None
    shares = [
        isinstance(t, Tensor) and t._is_view()
        for t in (result if isinstance(result, tuple | list) else [result])
    ]
    return result if all(shares) or result is view else None


def roles_of_parameter(origin: Origin, axes: Axes) -> tuple[Role, ...] | None:
    """Roles of the parameter's own dimensions, from those of the axes that an operator sees.

    Args:
        origin: its `view` is what the operator consumes.
        axes: axis of the view -> role.

    Returns:
        One role a dimension, or None where a dimension is both reduced and kept.
    """
    view, parameter = origin.view, origin.parameter
    by_axis: dict[int, Role] = {
        axis % view.ndim: role for axis, role in axes.items() if -view.ndim <= axis < view.ndim
    }
    roles: list[Role] = []
    for dim, size in enumerate(parameter.shape):
        found = {by_axis.get(axis, "batch") for axis in _axes_along(origin, dim)}
        if len(found) > 1:
            found.discard("batch")
        if len(found) > 1:
            return None
        if found:
            roles.append(found.pop())
        elif size == 1 and view.shape == parameter.shape:
            roles.append(by_axis.get(dim, "batch"))
        else:
            roles.append("batch")
    return tuple(roles)


def _axes_along(origin: Origin, dim: int) -> list[int]:
    """Axes of the view that walk along dimension `dim` of the parameter.

    An axis of stride t and size s visits multiples of t below t * s; a dimension of stride u and
    size n owns the multiples of u below u * n. They meet where these ranges overlap.
    """
    view, parameter = origin.view, origin.parameter
    low = parameter.stride(dim)
    high = low * parameter.shape[dim]
    return [
        axis
        for axis, (stride, size) in enumerate(zip(view.stride(), view.shape, strict=True))
        if size > 1 and stride > 0 and max(stride, low) < min(stride * size, high)
    ]


def slice_of_parameter(origin: Origin) -> tuple[int, int, int] | None:
    """(dimension, start, stop) of the part of the parameter that the view covers; None for all."""
    view, parameter = origin.view, origin.parameter
    if view.numel() >= parameter.numel():
        return None
    for dim, size in enumerate(parameter.shape):
        stride = parameter.stride(dim)
        start = view.storage_offset() // stride % size
        length = _extent(view.stride(), view.shape, stride, stride * size)
        if length < size:
            return dim, start, start + length
    return None


def _extent(strides: Sequence[int], sizes: Sequence[int], low: int, high: int) -> int:
    """How many steps of `low` the axes whose strides lie in [low, high) cover."""
    last = sum(
        (size - 1) * stride
        for stride, size in zip(strides, sizes, strict=True)
        if low <= stride < high
    )
    return last // low + 1
