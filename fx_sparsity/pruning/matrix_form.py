"""The matrix form: every weight as [groups, out, in], whatever its storage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fx_sparsity.patterns import PatternError, Role, Tiling

_PARTS: tuple[frozenset[Role], ...] = (
    frozenset({"batch"}),
    frozenset({"out", "dim"}),
    frozenset({"in", "row", "kernel"}),
)
"""Roles that make up groups, `out` and `in`. A table is looked up by row: as a product with one-hot
vectors it reduces its rows."""


class _Axis(NamedTuple):
    """An axis of the weight, a convolution's groups split off.

    Attributes:
        place: among the split axes.
        size: of the axis.
        extent: of a block along it.
        inner: 0 for a kernel's, 1 for others: which comes later among equals.
    """

    place: int
    size: int
    extent: int
    inner: int


@dataclass(frozen=True)
class MatrixForm:
    """How one weight and its pattern become [groups, out, in] and back.

    Blocks of the pattern are contiguous there: of the axes that make up `in`, those that blocks
    span lie innermost, those that they do not, outermost; else kernel positions come first, so that
    N:M runs over neighbouring columns.

    Attributes:
        split: shape of the weight, the groups of a grouped convolution being an axis of their own.
        order: the axes of `split` in the order of the matrix form.
        sizes: groups, out, in.
        tiling: the pattern in the matrix form.
        shape: of the weight.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, int, int]
    tiling: Tiling
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls, shape: Sequence[int], roles: Sequence[Role], tiling: Tiling, grouped: tuple[int, int]
    ) -> "MatrixForm":
        """The form of a weight.

        Args:
            shape: of the weight.
            roles: of its axes.
            tiling: its pattern, in storage dimensions.
            grouped: (axis that a grouped convolution splits, into how many groups); (0, 1) for
                every other weight.

        Raises:
            PatternError: blocks that are no blocks of neighbours in any matrix form.
        """
        axis, groups = grouped
        split, extents, kinds = list(shape), list(tiling.extents), list(roles)
        if groups > 1:
            split[axis : axis + 1] = [groups, shape[axis] // groups]
            extents[axis : axis + 1] = _split_extent(extents[axis], groups, shape[axis] // groups)
            kinds[axis : axis + 1] = ["batch", kinds[axis]]
        order: list[int] = []
        sizes: list[int] = []
        lengths: list[int] = []
        for part in _PARTS:
            axes = [
                _Axis(place, split[place], extents[place], kinds[place] != "kernel")
                for place in range(len(split))
                if kinds[place] in part
            ]
            ordered, length = _contiguous(axes, tiling)
            order += [axis.place for axis in ordered]
            sizes.append(math.prod(axis.size for axis in axes))
            lengths.append(length)
        matrix = Tiling(tuple(lengths), tiling.zeros, tiling.remainder)
        return cls(tuple(split), tuple(order), tuple(sizes), matrix, tuple(shape))  # type: ignore[arg-type]

    def columns(self, device: torch.device) -> Tensor:
        """Column of each element, numbered through all groups: int64, of the weight's shape.

        Takes no memory along `out`.
        """
        groups, out, size = self.sizes
        numbers = torch.arange(groups * size, device=device).view(groups, 1, size)
        return self.from_matrix(numbers.expand(groups, out, size))

    def to_matrix(self, weight: Tensor) -> Tensor:
        """[groups, out, in] of a tensor of the weight's shape; a view where that is possible."""
        return weight.reshape(self.split).permute(self.order).reshape(self.sizes)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        axes = matrix.reshape([self.split[place] for place in self.order])
        return axes.permute(inverse).reshape(self.shape)


def _split_extent(extent: int, groups: int, size: int) -> list[int]:
    """Extents along the groups and within a group of what was an extent along both."""
    if size % extent == 0:
        return [1, extent]
    if extent % size == 0 and groups % (extent // size) == 0:
        return [extent // size, size]
    raise PatternError(
        f"blocks of {extent} channels straddle the groups of a convolution, of {size} channels each"
    )


def _contiguous(axes: Sequence[_Axis], tiling: Tiling) -> tuple[list[_Axis], int]:
    """Axes from the outermost to the innermost, and the extent of blocks along all of them."""
    outer: list[_Axis] = []
    cut: list[_Axis] = []
    inner: list[_Axis] = []
    for axis in axes:
        ragged = tiling.remainder == "pad" and tiling.zeros != "level" and axis.extent > axis.size
        if axis.extent == axis.size or ragged:
            inner.append(axis._replace(extent=axis.size))
        else:
            (outer if axis.extent == 1 else cut).append(axis)
    crossed = len(cut) > 1 or (cut and outer and cut[0].size % cut[0].extent)
    if crossed:
        raise PatternError(
            f"blocks of {tuple(axis.extent for axis in axes)} along axes of "
            f"{tuple(axis.size for axis in axes)} elements, which make up one side of a matrix, "
            "leave edges within it; choose a pattern that divides them"
        )
    ordered = [
        *sorted(outer, key=lambda axis: axis.inner),
        *cut,
        *sorted(inner, key=lambda axis: axis.inner),
    ]
    return ordered, math.prod(axis.extent for axis in ordered)
