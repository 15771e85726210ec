"""The matrix form: every weight as [groups, out, in], whatever its storage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fx_sparsity.patterns import PatternError, Role, Tiling
from fx_sparsity.pruning.methods.groups import FilledTiling

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

    Where N:M does not divide the channels of a convolution, every position of the kernel has an
    edge. There the matrix is filled up with columns of zeros, which are the first to go, until all
    groups are whole: an edge that is pruned lacks the zeros that its filling has, and one that
    stays dense is spread over groups whose zeros are all filling.

    Attributes:
        split: shape of the weight, the groups of a grouped convolution being an axis of their own.
        order: the axes of `split` in the order of the matrix form.
        sizes: groups, out, in; with the filling.
        tiling: the pattern in the matrix form.
        shape: of the weight.
        places: where each of the weight's own columns is; empty where there is no filling.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, int, int]
    tiling: Tiling
    shape: tuple[int, ...]
    places: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        roles: Sequence[Role],
        tiling: Tiling,
        grouped: tuple[int, int],
        level: float,
    ) -> "MatrixForm":
        """The form of a weight.

        Args:
            shape: of the weight.
            roles: of its axes.
            tiling: its pattern, in storage dimensions.
            grouped: (axis that a grouped convolution splits, into how many groups); (0, 1) for
                every other weight.
            level: share that is to go.

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
        places: tuple[int, ...] = ()
        for part in _PARTS:
            axes = [
                _Axis(place, split[place], extents[place], kinds[place] != "kernel")
                for place in range(len(split))
                if kinds[place] in part
            ]
            outer, cut, inner = _sorted(axes, tiling)
            ordered = [*outer, *cut, *inner]
            order += [axis.place for axis in ordered]
            sizes.append(math.prod(axis.size for axis in axes))
            lengths.append(math.prod(axis.extent for axis in ordered))
            if len(cut) > 1 or (cut and outer and cut[0].size % cut[0].extent):
                if len(cut) > 1 or tiling.zeros != "level" or "in" not in part:
                    raise _leaves_edges(axes)
                places, sizes[-1] = _filled(cut[0], sizes[-1], tiling, level)
        matrix = Tiling(tuple(lengths), tiling.zeros, tiling.remainder)
        if places:
            filling = tuple(sorted({*range(sizes[-1])}.difference(places)))
            matrix = FilledTiling(matrix.extents, matrix.zeros, filling=filling)
        return cls(tuple(split), tuple(order), tuple(sizes), matrix, tuple(shape), places)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """The weight's own columns, without the filling."""
        return len(self.places) or self.sizes[2]

    def columns(self, device: torch.device) -> Tensor:
        """Column of each element, numbered through all groups: int64, of the weight's shape.

        Takes no memory along `out`.
        """
        groups, out, size = self.sizes
        numbers = self._own(torch.arange(groups * size, device=device).view(groups, 1, size))
        return self._stored(numbers.expand(groups, out, self.width))

    def to_matrix(self, weight: Tensor) -> Tensor:
        """[groups, out, in] of a tensor of the weight's shape; a view where that is possible."""
        own = weight.reshape(self.split).permute(self.order).reshape(*self.sizes[:2], self.width)
        if not self.places:
            return own
        matrix = own.new_zeros(self.sizes)
        matrix[..., self.places] = own
        return matrix

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`."""
        return self._stored(self._own(matrix))

    def _own(self, matrix: Tensor) -> Tensor:
        """A matrix without the filling."""
        return matrix[..., self.places] if self.places else matrix

    def _stored(self, own: Tensor) -> Tensor:
        """The tensor of the weight's shape that a matrix without filling stands for."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        axes = own.reshape([self.split[place] for place in self.order])
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


def _sorted(axes: Sequence[_Axis], tiling: Tiling) -> tuple[list[_Axis], list[_Axis], list[_Axis]]:
    """Axes that blocks do not span, those that they cut, and those that they span whole."""
    outer: list[_Axis] = []
    cut: list[_Axis] = []
    inner: list[_Axis] = []
    for axis in axes:
        ragged = tiling.remainder == "pad" and tiling.zeros != "level" and axis.extent > axis.size
        if axis.extent == axis.size or ragged:
            inner.append(axis._replace(extent=axis.size))
        else:
            (outer if axis.extent == 1 else cut).append(axis)
    for part in (outer, inner):
        part.sort(key=lambda axis: axis.inner)
    return outer, cut, inner


def _leaves_edges(axes: Sequence[_Axis]) -> PatternError:
    return PatternError(
        f"blocks of {tuple(axis.extent for axis in axes)} along axes of "
        f"{tuple(axis.size for axis in axes)} elements, which make up one side of a matrix, "
        "leave edges within it; choose a pattern that divides them"
    )


def _filled(axis: _Axis, columns: int, tiling: Tiling, level: float) -> tuple[tuple[int, ...], int]:
    """Where the columns go that N:M cuts into groups, when all groups are filled up; and how wide
    that is.

    Args:
        axis: the innermost; the others repeat it.
        columns: of the matrix, without the filling.
        tiling: of the weight.
        level: share that is to go.
    """
    group = axis.extent
    rest = axis.size % group
    most = rest if tiling.remainder == "pad" else group - round(level * group)
    taken = [group] * (axis.size // group) + [most] * (rest // most)
    taken += [rest % most] if rest % most else []
    # The filling comes first in a group: among equals, what comes first goes.
    one = [group * (i + 1) - n + k for i, n in enumerate(taken) for k in range(n)]
    width = group * len(taken)
    repeats = columns // axis.size
    return tuple(width * i + place for i in range(repeats) for place in one), width * repeats
