"""What a node holds of a parameter, and what its strides say of the parameter's axes.

An operator sees axes, and each of them has a stride; a stride points back at the dimension of the
parameter that it walks along. All of it on meta tensors; no copy of any data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fx_sparsity.graph.compiled import real_tensors
from fx_sparsity.graph.operators import Axes
from fx_sparsity.graph.sources import place_of
from fx_sparsity.patterns import Role


@dataclass(frozen=True)
class Origin:
    """What a node holds: a view of a parameter, or of a copy of such a view.

    Attributes:
        fqn: canonical name of the parameter.
        parameter: contiguous meta tensor; of the parameter's shape, or of the copy's.
        view: the same storage as this node sees it (a sequence for split and chunk).
        dequantized: whether a dequantize operator lies between.
        before: what was copied; axis i of its view became dimension i of `parameter`. None where
            `parameter` is the parameter itself.
        exact: whether what arrives is this view and nothing else: neither picked from it by an
            index, nor placed beside other tensors.
        reordered: dimensions of the copy along which it holds the elements of what was copied in
            another order, more than once, or beside others.
        summed: dimensions of the copy that a product of constants has summed over since.
        zero: what becomes of a zero of the parameter on the way; NaN where no number says it.
        moved_by: the operator that made it so, where it is no zero any more.
        number: the value of a constant of one element, where it is known.
        through: an operator on the way that mixes elements, so that no axis can be known any more.
    """

    fqn: str
    parameter: Tensor
    view: Any
    dequantized: bool = False
    before: "Origin | None" = None
    exact: bool = True
    reordered: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()
    zero: float = 0.0
    moved_by: str = ""
    number: float | None = None
    through: str = ""

    def moved(self, op: str, zero: float = math.nan) -> "Origin":
        """The origin after an operator that makes `zero` of what zeros have become."""
        first = self.moved_by or op
        return replace(self, zero=zero, moved_by="" if zero == 0 else first, number=None)

    @property
    def is_factor(self) -> bool:
        """Whether the parameter is but a factor of this, in a product of constants."""
        return bool(self.summed) or (self.before is not None and self.before.is_factor)

    def copied(self, shape: Sequence[int]) -> "Origin":
        """The origin of a contiguous tensor whose axes are, one by one, those of this view."""
        fresh = self.view.new_empty(shape)
        none: frozenset[int] = frozenset()
        return replace(self, parameter=fresh, view=fresh, before=self, reordered=none, summed=none)


Origins = Mapping[fx.Node, Sequence[Origin]]


def origin_of(fqn: str, tensor: Tensor) -> Origin:
    """The origin of a node that is the parameter itself."""
    meta = torch.empty(tensor.shape, device="meta", dtype=tensor.dtype)
    known = tensor.numel() == 1 and not tensor.is_complex() and place_of(tensor) is not None
    with real_tensors():
        return Origin(fqn, meta, meta, number=float(tensor.detach()) if known else None)


def region_of(shape: Sequence[int]) -> Origin:
    """All of a tensor that is written into."""
    whole = torch.empty(shape, device="meta")
    return Origin("", whole, whole)


def placed(origin: Origin, region: Origin | None) -> Origin | None:
    """The origin of a whole tensor into whose `region` a tensor is written.

    Its axes are those of the region, as long as the whole's. None where that is not known.
    """
    if origin.through or region is None or region.before is not None:
        return None
    view, whole = region.view, region.parameter
    along = [axes_along(region, dim) for dim in range(whole.ndim)]
    axes = [axis for found in along for axis in found]
    try:
        spread = origin.view.expand(view.shape)
    except (AttributeError, RuntimeError):
        return None  # shapes that are not known, or several tensors
    if len(axes) > len(set(axes)) or any(len(found) > 1 for found in along):
        return None
    shape = list(view.shape)
    for size, found in zip(whole.shape, along, strict=True):
        for axis in found:
            shape[axis] = size
    copy = replace(origin, view=spread).copied(shape)
    strides = [copy.view.stride(found[0]) if found else 0 for found in along]
    return replace(copy, view=copy.view.as_strided(whole.shape, strides), exact=False)


def roles_of_parameter(origin: Origin, axes: Axes) -> tuple[Role, ...] | None:
    """Roles of the parameter's own dimensions, from those of the axes that an operator sees.

    Args:
        origin: its `view` is what the operator consumes.
        axes: axis of the view -> role.

    Returns:
        One role a dimension, or None where a dimension is both reduced and kept.
    """
    view, parameter = origin.view, origin.parameter
    rest = axes.get(None, "batch")
    by_axis: dict[int, Role] = {
        axis % view.ndim: role
        for axis, role in axes.items()
        if axis is not None and -view.ndim <= axis < view.ndim
    }
    single = [by_axis.get(axis, rest) for axis, size in enumerate(view.shape) if size == 1]
    roles: list[Role] = []
    for dim, size in enumerate(parameter.shape):
        found = {by_axis.get(axis, rest) for axis in axes_along(origin, dim)}
        if len(found) > 1:
            found.discard("batch")
        if len(found) > 1:
            return None
        if found:
            roles.append(found.pop())
        elif size == 1 and view.shape == parameter.shape:
            roles.append(by_axis.get(dim, rest))
        elif size == 1 and len(single) == 1 and list(parameter.shape).count(1) == 1:
            roles.append(single[0])  # strides say nothing of an axis of one, but there is only one
        else:
            roles.append("batch")
    for dim in origin.summed:
        # What is left of a product x @ (a @ b) = (x @ a) @ b: the other end of its own layer.
        ends = [role for role in roles if role in _OTHER_END]
        if len(ends) != 1:
            return None
        roles[dim] = _OTHER_END[ends[0]]
    if origin.before is not None:
        return roles_of_parameter(origin.before, dict(enumerate(roles)))
    return tuple(roles)


_OTHER_END: dict[Role, Role] = {"out": "in", "in": "out"}


def reordered_dimensions(origin: Origin) -> tuple[int, ...]:
    """Dimensions of the parameter along which the view is not in the order of its storage."""
    view, own = origin.view, origin.parameter
    found = set(origin.reordered | origin.summed)
    for dim in range(own.ndim):
        strides = [view.stride(axis) for axis in axes_along(origin, dim)]
        if strides and min(strides) > own.stride(dim):
            found.add(dim)
    before = origin.before
    if before is None:
        return tuple(sorted(found))
    repeated = [dim for dim, stride in enumerate(before.view.stride()) if not stride]
    for inner in repeated:  # an axis that walks along a repetition first: each element, again
        walked = set(axes_along(origin, inner))
        found |= {dim for dim in range(inner) if walked.intersection(axes_along(origin, dim))}
    dims = range(before.parameter.ndim)
    earlier = {dim for dim in dims if found.intersection(axes_along(before, dim))}
    return tuple(sorted(earlier.union(reordered_dimensions(before))))


def axes_along(origin: Origin, dim: int) -> list[int]:
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
    """(dimension, start, stop) of the part of the parameter that the view covers; None for all.

    What is cut off after a copy is not known: the part is then a larger one, never a smaller.
    """
    while origin.before is not None:
        origin = origin.before
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
