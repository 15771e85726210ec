"""2:4 for forward and backward: the mask suits a weight and its transpose."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fx_sparsity.masks import Rank
from fx_sparsity.masks.transposable import transposable_mask
from fx_sparsity.patterns import NM, PatternError, Tiling
from fx_sparsity.training.straight_through import StraightThrough


class TransposableStraightThrough(StraightThrough):
    """SR-STE with masks that are 2:4 along rows and along columns (arXiv 2102.08124).

    Backward multiplies by the transpose of a weight, which such a mask makes 2:4 as well. It keeps
    the greatest sum of magnitudes of all masks that are both, which takes longer to find than a
    mask that is 2:4 one way. Training itself computes with dense kernels.

    Args:
        every: see `StraightThrough`.
        begin: see `StraightThrough`.
        end: see `StraightThrough`.
        decay: see `StraightThrough`.
    """

    def __init__(
        self, every: int = 100, begin: int = 0, end: int | None = None, decay: float = 2e-4
    ) -> None:
        super().__init__(every, begin, end, decay, "L1")
        self.defaults |= {"pattern": "2:4"}

    def check_config(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> None:
        """See `SparsifierCore.check_config`.

        Raises:
            PatternError: another pattern than 2:4, or a shape that cannot be 2:4 both ways.
        """
        super().check_config(name, tensor, config)
        pattern, _ = self.pattern_of(config)
        if pattern != NM(2, 4) or tensor.ndim != 2 or any(size % 4 for size in tensor.shape):
            raise PatternError(
                f"{name}: expected pattern 2:4 and two dimensions that are multiples of 4, "
                f"found {pattern} and shape {tuple(tensor.shape)}; exclude it, or choose "
                "StraightThrough"
            )

    def choose(self, name: str, weight: Tensor, tiling: Tiling, level: float) -> Tensor:
        """See `TrainingMethod.choose`."""
        return transposable_mask(Rank.MAGNITUDE.scores(weight))
