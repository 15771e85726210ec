"""The base of calibrated sparsifiers: a weight and its statistics in, a mask and an update out."""

from abc import abstractmethod
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods.statistics import Statistic, Statistics
from fx_sparsity.quantization.grid import Grid
from fx_sparsity.sparsifier.base import BaseSparsifier
from fx_sparsity.sparsifier.target import MaskError

Sequential = bool | Literal["blocks"]
"""Whether batches go on with what pruned weights give out, or pruned blocks; see `prune`."""


class Solution(NamedTuple):
    """What a method makes of one weight, in matrix form.

    Attributes:
        mask: boolean, [groups, out, in]; True is kept.
        weight: float32, [groups, out, in]: kept values, updated or not.
        notes: what a user should know, such as a damping that had to be raised.
        scales: of a method that rounds to a grid, float32, [groups, out, groups of the grid]; None
            of any other.
    """

    mask: Tensor
    weight: Tensor
    notes: tuple[str, ...] = ()
    scales: Tensor | None = None


class CalibratedSparsifier(BaseSparsifier):
    """Masks, and possibly updates, one weight at a time from the statistics of its uses.

    `prune` collects the statistics and calls `solve`; `step` alone has none and says so.

    Attributes:
        needs: the statistics that `solve` looks at.
        grid: that kept values are rounded to; None where they are not.
        sequential: how `prune` has the weights take turns unless it is told.
    """

    needs: frozenset[Statistic] = frozenset()
    grid: Grid | None = None
    sequential: Sequential = True

    @abstractmethod
    def solve(self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float) -> Solution:
        """Choose a mask, and values for what is kept.

        Args:
            weight: float32, [groups, out, in]. Not changed.
            stats: with everything that `needs` names. Not changed either: weights that have the
                same inputs share them.
            tiling: the pattern for this matrix form.
            level: share to prune, in [0, 1].
        """

    def update_mask(self, module: nn.Module, tensor_name: str, **config: Any) -> None:
        """Without statistics there is nothing to go by.

        Raises:
            MaskError: always.
        """
        raise MaskError(
            f"{config.get('tensor_fqn', tensor_name)}: {type(self).__name__} needs calibration "
            "data; call fx_sparsity.prune(model, sparsifier, batches) instead of step()"
        )
