"""Masks from scores: a function of a weight and its statistics is a whole method."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.masks import ScoreError, compute_mask
from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods.calibrated import CalibratedSparsifier, Solution
from fx_sparsity.pruning.methods.groups import (
    UNSEEN,
    FilledTiling,
    about,
    group_levels,
    required,
    unseen_groups,
)
from fx_sparsity.pruning.methods.statistics import Statistic, Statistics
from fx_sparsity.pruning.methods.where import select
from fx_sparsity.sparsifier.core import roles_of
from fx_sparsity.sparsifier.target import MaskError

Criterion = Callable[[Tensor, Statistics], Tensor]
"""A weight, float32 [groups, out, in], and its statistics in; scores of that shape out."""


class CriterionSparsifier(CalibratedSparsifier):
    """Prunes what a criterion scores lowest; kept values stay as they are.

    All groups are ranked together, as the pattern says. Where a criterion needs data and no token
    reached a group, every group is ranked on its own, and that one by magnitude.

    Args:
        criterion: `criterion(weight, stats)` gives a score for each element, without NaN.
        needs: names of the statistics that it looks at.
    """

    def __init__(self, criterion: Criterion, needs: Iterable[Statistic] = ()) -> None:
        super().__init__()
        self.criterion = criterion
        self.needs = frozenset(needs)

    def update_mask(self, module: nn.Module, tensor_name: str, **config: Any) -> None:
        """See `BaseSparsifier.update_mask`; only for criteria that look at the weight alone.

        Raises:
            MaskError: the criterion needs data.
            ScoreError: the scores cannot be ranked; the weight is named.
        """
        if self.needs:
            super().update_mask(module, tensor_name, **config)
        name = self.name_of(module, tensor_name)
        found = self.pattern_of(config)
        if found is None:
            raise MaskError(f"{name}: {type(self).__name__} has no default pattern; pass a mapping")
        (pattern, level), weight = found, self.get_tensor(name).detach()
        nothing = Statistics(torch.zeros(1, dtype=torch.int64))
        tiling = pattern.tiling(weight.shape, roles_of(config, weight.ndim))
        try:
            scores = self.criterion(weight.float(), nothing)
            compute_mask(scores, tiling, level, out=self.get_mask(name))
        except ScoreError as error:
            raise ScoreError(f"{name}: {error}") from error

    def solve(self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float) -> Solution:
        """See `CalibratedSparsifier.solve`.

        Raises:
            ScoreError: the criterion's scores have another shape, or cannot be ranked.
            ValueError: a statistic is missing.
        """
        scores = self.criterion(weight, stats)
        if scores.shape != weight.shape:
            raise ScoreError(
                f"expected scores of the weight's shape {tuple(weight.shape)}, "
                f"the criterion returned {tuple(scores.shape)}"
            )
        if isinstance(tiling, FilledTiling):
            scores = tiling.rank_first(scores)
        unseen = unseen_groups(stats) if self.needs else []
        if unseen:
            scores = scores.clone()
            scores[unseen] = weight[unseen].abs()
            levels = group_levels(tiling, weight.shape, level)
            parts = zip(scores.split(1), levels, strict=True)
            mask = torch.cat([self.rank(part, tiling, share) for part, share in parts])
        else:
            mask = self.rank(scores, tiling, level)
        notes = [note for group in unseen for note in about(group, len(weight), [UNSEEN])]
        return Solution(mask, select(mask, weight), tuple(notes))

    def rank(self, scores: Tensor, tiling: Tiling, level: float) -> Tensor:
        """The mask of these scores: the pattern's own ranking."""
        return compute_mask(scores, tiling, level)


class MagnitudeSparsifier(CriterionSparsifier):
    """|w|: what can be had without data."""

    def __init__(self) -> None:
        super().__init__(_magnitude)


class RandomSparsifier(CriterionSparsifier):
    """Uniform scores: what any method has to beat.

    Args:
        seed: weights of one shape get one mask from one seed.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(_Random(seed))


class WandaSparsifier(CriterionSparsifier):
    """|w_ij| * ||x_j||_2: a weight counts by what it adds to the output (arXiv 2306.11695, eq. 1).

    Unstructured patterns are ranked within each output row, as in the paper, and still prune
    `round(level * elements)` in all: where that is no multiple of the rows, the first rows lose one
    more. Every other pattern ranks as it always does.

    Inputs that calibration never met, such as rows of a table that nobody looked up, have a norm of
    zero. They count a ten-thousandth of the least norm that there is instead, so that they go
    first, and among themselves by magnitude.

    All weights of a block see it as it was, as in the paper's code: at 70% a language model then
    loses less than if each weight saw those pruned before it.
    """

    sequential = "blocks"

    def __init__(self) -> None:
        super().__init__(_wanda, needs={"input_norm"})

    def rank(self, scores: Tensor, tiling: Tiling, level: float) -> Tensor:
        """See `CriterionSparsifier.rank`."""
        if tiling.zeros != "all" or tiling.block_size > 1 or not scores.numel():
            return super().rank(scores, tiling, level)
        rows = scores.flatten(0, 1)
        width = rows.shape[1]
        few, longer = divmod(round(level * rows.numel()), len(rows))
        whole = Tiling((1, width), zeros="level")
        parts = [(rows[:longer], few + 1), (rows[longer:], few)]
        masks = [compute_mask(part, whole, zeros / width) for part, zeros in parts if len(part)]
        return torch.cat(masks).view(scores.shape)


class GradientSparsifier(CriterionSparsifier):
    """|g|, the loss's gradient summed over the batches: what the loss is sensitive to."""

    def __init__(self) -> None:
        super().__init__(_gradient, needs={"gradient"})


class TaylorSparsifier(CriterionSparsifier):
    """|w * g|: how the loss changes, to first order, when w goes (arXiv 1611.06440, eq. 7)."""

    def __init__(self) -> None:
        super().__init__(_taylor, needs={"gradient"})


class FisherSparsifier(CriterionSparsifier):
    """w^2 * sum of g^2: how it changes to second order (arXiv 1801.05787, eq. 5).

    The curvature is the diagonal of the empirical Fisher information.
    """

    def __init__(self) -> None:
        super().__init__(_fisher, needs={"gradient_norm"})


class MovementSparsifier(CriterionSparsifier):
    """-w * g: keeps what a gradient step would move away from zero (arXiv 2005.07683)."""

    def __init__(self) -> None:
        super().__init__(_movement, needs={"gradient"})


def _magnitude(weight: Tensor, stats: Statistics) -> Tensor:
    return weight.abs()


_UNSEEN_SHARE = 1e-8
"""Of the least sum of squares that was seen: what counts for inputs that were all zero."""


def _wanda(weight: Tensor, stats: Statistics) -> Tensor:
    """Rows of a table that were never looked up would all score 0, and ties go by position."""
    squares = required(stats, "squares")
    seen = squares[squares > 0]
    least = float(seen.min()) * _UNSEEN_SHARE if len(seen) else 1.0
    return weight.abs() * squares.clamp(min=least).sqrt().unsqueeze(1)


def _gradient(weight: Tensor, stats: Statistics) -> Tensor:
    return required(stats, "gradients").abs()


def _taylor(weight: Tensor, stats: Statistics) -> Tensor:
    return (weight * required(stats, "gradients")).abs()


def _fisher(weight: Tensor, stats: Statistics) -> Tensor:
    return weight.square() * required(stats, "gradient_squares")


def _movement(weight: Tensor, stats: Statistics) -> Tensor:
    return -weight * required(stats, "gradients")


@dataclass(frozen=True)
class _Random:
    seed: int

    def __call__(self, weight: Tensor, stats: Statistics) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
