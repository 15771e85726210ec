"""Methods that see how inputs go together: one matrix and its Gram matrix at a time.

All of them lower the same error, that of a layer's outputs: ||(W - V) X||^2 over the V that the
pattern allows (arXiv 2301.00774, eq. 1).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fx_sparsity.masks import ScoreError, compute_mask, contains_nan
from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods.calibrated import CalibratedSparsifier, Solution
from fx_sparsity.pruning.methods.groups import UNSEEN, about, group_levels, matrix_tiling, required
from fx_sparsity.pruning.methods.hessian import Hessian
from fx_sparsity.pruning.methods.statistics import Statistic, Statistics
from fx_sparsity.pruning.methods.where import select
from fx_sparsity.quantization.grid import Grid


class Layer(NamedTuple):
    """One group of a weight.

    Attributes:
        weight: W, float32 [out, in].
        hessian: how inputs go together; None where they do not, or where nothing is known.
        squares: sum of squares of each input, float32 [in]; ones where nothing is known.
        tiling: of [out, in].
        level: share of its blocks that go.
        note: why there is no Hessian, or empty.
    """

    weight: Tensor
    hessian: Hessian | None
    squares: Tensor
    tiling: Tiling
    level: float
    note: str

    def ranked(self) -> Solution:
        """The best mask where inputs do not go together: pruning w costs w^2 x^2."""
        mask = compute_mask(self.weight.square() * self.squares, self.tiling, self.level)
        return Solution(mask, select(mask, self.weight), (self.note,))


def layers(
    weight: Tensor, stats: Statistics, tiling: Tiling, level: float, damping: float
) -> Iterator[Layer]:
    """The groups of a weight, each with its share of the level.

    A lookup never reads two rows at once: its Gram matrix is diagonal, and `squares` alone stand
    for it.

    Args:
        weight: float32, [groups, out, in].
        stats: with `gram`, or `squares` where it would be diagonal.
        tiling: for the whole weight.
        level: share of blocks to prune.
        damping: of the Hessians, see `Hessian`.

    Raises:
        ValueError: statistics are missing, or are no sums of squares.
        PatternError: blocks span several groups.
    """
    levels = group_levels(tiling, weight.shape, level)
    matrix = matrix_tiling(tiling)
    for group, tokens in enumerate(stats.tokens.tolist()):
        gram = None if stats.gram is None else stats.gram[group]
        squares = required(stats, "squares")[group] if gram is None else gram.diagonal()
        hessian, note = None, ""
        if not tokens:
            squares, note = torch.ones_like(squares), UNSEEN
        elif gram is None:
            note = "its inputs never go together, so nothing is updated"
        elif not bool(squares.any()):
            squares = torch.ones_like(squares)
            note = "every input is zero, so it is ranked by magnitude and not updated"
        else:
            hessian = Hessian.of(gram, damping)
        yield Layer(weight[group], hessian, squares, matrix, levels[group], note)


def stacked(parts: Sequence[Solution]) -> Solution:
    """Solutions of single groups as that of the whole weight."""
    notes = [n for group, part in enumerate(parts) for n in about(group, len(parts), part.notes)]
    scales = [part.scales for part in parts if part.scales is not None]
    if len(parts) == 1:  # not copied
        masks, weights = parts[0].mask[None], parts[0].weight[None]
    else:
        masks = torch.stack([part.mask for part in parts])
        weights = torch.stack([part.weight for part in parts])
    return Solution(masks, weights, tuple(notes), torch.stack(scales) if scales else None)


class GramSparsifier(CalibratedSparsifier):
    """Base of methods that work on a Gram matrix. Override `solve_layer`.

    Every group gets its share of the level. Where its inputs do not go together, or no token
    reached it, there is nothing to make up for a pruned weight: `Layer.ranked`.

    Args:
        damping: added to the Gram matrix's diagonal, as a share of its mean.
    """

    needs: frozenset[Statistic] = frozenset({"gram"})

    def __init__(self, damping: float = 0.01) -> None:
        super().__init__()
        if damping < 0:
            raise ValueError(f"damping: expected a share of the mean diagonal, found {damping!r}")
        self.damping = damping

    def solve(self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float) -> Solution:
        """See `CalibratedSparsifier.solve`.

        Raises:
            ScoreError: the weight holds a NaN.
            ValueError: statistics are missing, or hold no Gram matrix.
            PatternError: blocks span several groups.
        """
        if contains_nan(weight):
            raise ScoreError("the weight contains NaN; its mask cannot be computed")
        return stacked(
            [
                layer.ranked() if layer.hessian is None else self.solve_layer(layer, layer.hessian)
                for layer in layers(weight, stats, tiling, level, self.damping)
            ]
        )

    @abstractmethod
    def solve_layer(self, layer: Layer, hessian: Hessian) -> Solution:
        """Solve one group, [out, in]."""


class Refinement(ABC):
    """A further step on a solution. Override `refine_layer`.

    Groups whose inputs do not go together, or that no token reached, are left as they are, but for
    what `refine_apart` does.

    Args:
        damping: added to the Gram matrix's diagonal, as a share of its mean.

    Attributes:
        grid: that kept values are rounded to; None where they are not.
    """

    needs: frozenset[Statistic] = frozenset({"gram"})
    grid: Grid | None = None

    def __init__(self, damping: float = 0.01) -> None:
        if damping < 0:
            raise ValueError(f"damping: expected a share of the mean diagonal, found {damping!r}")
        self.damping = damping

    def refine(
        self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float, found: Solution
    ) -> Solution:
        """A better solution than `found`, which is not changed.

        Args:
            weight: the dense weight, float32 [groups, out, in].
            stats: with everything that `needs` names.
            tiling: the pattern for this matrix form.
            level: share to prune.
            found: what an earlier step made of `weight`.
        """
        parts = []
        for layer, mask, kept in zip(
            layers(weight, stats, tiling, level, self.damping),
            found.mask,
            found.weight,
            strict=True,
        ):
            part = Solution(mask, kept)
            if layer.hessian is None:
                parts.append(self.refine_apart(layer, part))
            else:
                parts.append(self.refine_layer(layer, layer.hessian, part))
        refined = stacked(parts)
        return refined._replace(notes=(*found.notes, *refined.notes))

    @abstractmethod
    def refine_layer(self, layer: Layer, hessian: Hessian, found: Solution) -> Solution:
        """Refine one group, [out, in]; its notes speak of this step only."""

    def refine_apart(self, layer: Layer, found: Solution) -> Solution:
        """The same for a group without a Hessian, where `layer.note` says why it has none."""
        del layer
        return found


class Pipeline(CalibratedSparsifier):
    """A mask from one method, refined by others in turn.

        Pipeline(SparseGPTSparsifier(), Swaps(), ExactUpdate())

    Args:
        first: finds the mask.
        steps: see the dense weight, the statistics, and what the step before them made.

    Raises:
        ValueError: a step behind one that rounds, which would leave the grid.
    """

    def __init__(self, first: CalibratedSparsifier, *steps: Refinement) -> None:
        super().__init__()
        self.first, self.refinements = first, steps
        chain: list[CalibratedSparsifier | Refinement] = [first, *steps]
        for step, later in pairwise(chain):
            if step.grid is not None:
                raise ValueError(
                    f"{type(step).__name__} rounds, and {type(later).__name__} behind it would "
                    "leave the grid; put it last"
                )
        self.grid = chain[-1].grid
        self.needs = first.needs.union(*(step.needs for step in steps))

    def solve(self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float) -> Solution:
        """See `CalibratedSparsifier.solve`."""
        found = self.first.solve(weight, stats, tiling, level)
        for step in self.refinements:
            found = step.refine(weight, stats, tiling, level, found)
        return found
