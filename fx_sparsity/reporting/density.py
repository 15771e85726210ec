"""Pictures of where a weight is zero: a corner element by element, and the whole downsampled."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fx_sparsity.patterns import Role
from fx_sparsity.verification import read_weights

CORNER = 32
"""Most rows and columns of a corner: N:M groups and blocks of up to half of it can be seen."""
CELLS = 24
"""Most rows and columns of the downsampled weight."""


@dataclass(frozen=True)
class Density:
    """Where a weight is not zero, as a matrix.

    Attributes:
        shape: of the weight.
        zeros: share of them.
        corner: boolean, the first rows and columns, element by element; True where not zero.
        overview: float in [0, 1], the whole weight; the share of values of a cell that are not
            zero.
    """

    shape: tuple[int, ...]
    zeros: float
    corner: Tensor
    overview: Tensor


class Densities(Mapping[str, Density]):
    """FQN -> `Density`."""

    def __init__(self, weights: Mapping[str, Density]) -> None:
        self._weights = dict(weights)

    def __getitem__(self, fqn: str) -> Density:
        return self._weights[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@torch.no_grad()
def density_of(zero: Tensor, roles: Sequence[Role] = ()) -> Density:
    """The pictures of one weight.

    Args:
        zero: boolean, True where the weight is zero; of any shape, with an element at least.
        roles: of its axes; a `batch` axis in front, as of experts, goes with the rows.
    """
    rows = 2 if "batch" in roles[:1] else 1
    height = zero.shape[:rows].numel() if zero.ndim else 1
    matrix = zero.reshape(height, -1)
    return Density(
        shape=tuple(zero.shape),
        zeros=int(zero.count_nonzero()) / zero.numel(),
        corner=~matrix[:CORNER, :CORNER].cpu(),
        overview=1 - _downsampled(matrix),
    )


def densities(model: nn.Module | ExportedProgram) -> Densities:
    """The pictures of every matrix that a model stores, quantized or not; zero is in code space.

    Args:
        model: as `verify` takes it. Not changed.
    """
    return Densities(
        {
            weight.fqn: density_of(weight.zeros(), weight.roles or ())
            for weight in read_weights(model)
            if weight.data.ndim > 1 and weight.data.numel() and not weight.obstacle
        }
    )


def _downsampled(matrix: Tensor) -> Tensor:
    """Means of at most `CELLS` x `CELLS` cells; strip by strip, which takes little memory."""
    row_ends, column_ends = (_ends(size) for size in matrix.shape)
    widths = column_ends.diff(prepend=column_ends.new_zeros(1))
    lines, start = [], 0
    for end in row_ends.tolist():
        counts = matrix[start:end].sum(0, dtype=torch.float64).cpu().cumsum(0)[column_ends - 1]
        lines.append(counts.diff(prepend=counts.new_zeros(1)) / (widths * (end - start)))
        start = end
    return torch.stack(lines).float()


def _ends(size: int) -> Tensor:
    """Where each cell ends along an axis."""
    cells = min(size, CELLS)
    return torch.arange(1, cells + 1) * size // cells
