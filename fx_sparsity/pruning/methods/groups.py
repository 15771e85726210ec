"""One group at a time: every expert is a matrix of its own, with statistics of its own."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fx_sparsity.patterns import PatternError, Tiling
from fx_sparsity.pruning.methods.statistics import Statistics


@dataclass(frozen=True)
class FilledTiling(Tiling):
    """A tiling of a matrix that has columns which stand for nothing: they go before all others.

    Attributes:
        filling: these columns. Weights and inputs are zeros there.
    """

    filling: tuple[int, ...] = ()

    def rank_first(self, scores: Tensor) -> Tensor:
        """Scores of [groups, out, in] that make the filling go first."""
        scores = scores.clone()
        scores[..., self.filling] = -math.inf
        return scores


def matrix_tiling(tiling: Tiling) -> Tiling:
    """A tiling of [groups, out, in] as that of a single [out, in].

    Raises:
        PatternError: its blocks span several groups.
    """
    if tiling.extents[0] != 1:
        raise PatternError(
            f"expected blocks that lie within one group, found blocks of {tiling.extents} "
            "elements (groups, out, in)"
        )
    return Tiling(tiling.extents[1:], tiling.zeros, tiling.remainder)


def group_levels(tiling: Tiling, shape: tuple[int, ...], level: float) -> list[float]:
    """The level of each group: shares as equal as can be, that together choose what `level` does.

    Args:
        tiling: for the whole weight.
        shape: [groups, out, in].
        level: share of all blocks.
    """
    matrix = matrix_tiling(tiling)
    blocks = math.prod(matrix.grid(shape[1:]))
    if tiling.zeros == "level" or not blocks:
        return [level] * shape[0]
    ends = [round(level * blocks * (group + 1)) for group in range(shape[0])]
    return [(end - start) / blocks for start, end in zip([0, *ends], ends, strict=False)]


def unseen_groups(stats: Statistics) -> list[int]:
    """Groups that no token reached."""
    return (stats.tokens == 0).nonzero().flatten().tolist()


UNSEEN = "no token reached it, so it is ranked by magnitude and not updated"


def about(group: int, groups: int, notes: Iterable[str]) -> tuple[str, ...]:
    """Notes on one group, which is named where there are several."""
    return tuple(notes) if groups == 1 else tuple(f"group {group}: {note}" for note in notes)


def required(stats: Statistics, name: str) -> Tensor:
    """One statistic.

    Raises:
        ValueError: it was not collected.
    """
    value = getattr(stats, name)
    if value is None:
        raise ValueError(f"expected statistics with `{name}`, which were not collected")
    return value
