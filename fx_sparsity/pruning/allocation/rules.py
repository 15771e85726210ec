"""Rules that spread one level over the weights of a model; `prune` takes one as `allocation`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.allocation import levels as allocation
from fx_sparsity.pruning.allocation.levels import Levels, Prunable
from fx_sparsity.pruning.methods.calibrated import CalibratedSparsifier
from fx_sparsity.pruning.methods.criterion import Criterion, MagnitudeSparsifier
from fx_sparsity.pruning.methods.groups import required
from fx_sparsity.pruning.methods.statistics import Statistic, Statistics, relative_error


class Seen(NamedTuple):
    """What a rule sees of one weight of the dense model, in matrix form.

    Attributes:
        weight: float32, [groups, out, in].
        stats: with everything that the rule needs.
        tiling: its pattern.
        method: that is to prune it.
    """

    weight: Tensor
    stats: Statistics
    tiling: Tiling
    method: CalibratedSparsifier


class Allocation(ABC):
    """Base of rules that go by shapes and patterns. Override `levels`."""

    @abstractmethod
    def levels(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> Levels:
        """How much goes from each weight.

        Args:
            weights: by FQN.
            level: share of all their elements that goes.
            measured: FQN -> what `MeasuredAllocation.measure` returned, tensors of [groups, out,
                in] turned into the weight's own shape; empty for rules that measure nothing.

        Raises:
            ValueError: a pattern fixes its level, or the patterns cannot prune that much.
        """


class MeasuredAllocation(Allocation):
    """Base of rules that look at each weight and its statistics first. Override `measure`, too.

    Attributes:
        needs: the statistics that `measure` looks at.
        solves: whether it calls the method, which then gets the statistics that it needs.
    """

    needs: frozenset[Statistic] = frozenset()
    solves: bool = False

    @abstractmethod
    def measure(self, seen: Seen) -> Any:
        """What `levels` is to know of a weight; held for all of them at once."""


class Uniform(Allocation):
    """The same share of every weight, see `allocation.uniform`."""

    def levels(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> Levels:
        """See `Allocation.levels`."""
        return allocation.uniform(weights, level)


class ErdosRenyi(Allocation):
    """Thin weights stay denser, see `allocation.erdos_renyi`."""

    def levels(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> Levels:
        """See `Allocation.levels`."""
        return allocation.erdos_renyi(weights, level)


class OWL(MeasuredAllocation):
    """Less from weights with many outliers among their Wanda scores (arXiv 2310.05175).

    Args:
        spread: see `allocation.owl`.
        multiple: of the mean score from which on one is an outlier.
    """

    needs: frozenset[Statistic] = frozenset({"input_norm"})

    def __init__(self, spread: float = 0.08, multiple: float = 5.0) -> None:
        self.spread, self.multiple = spread, multiple

    def measure(self, seen: Seen) -> float:
        """Share of outliers."""
        scores = seen.weight.abs() * required(seen.stats, "squares").sqrt().unsqueeze(1)
        return allocation.outlier_ratio(scores, self.multiple)

    def levels(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> Levels:
        """See `Allocation.levels`."""
        return allocation.owl(weights, level, measured, self.spread)


class GlobalRanking(MeasuredAllocation):
    """One ranking over all weights, see `allocation.global_ranking`. Holds the scores of all.

    Args:
        criterion: `criterion(weight, stats)` gives a score for each element; magnitudes by default.
        needs: names of the statistics that it looks at.
    """

    def __init__(self, criterion: Criterion | None = None, needs: Iterable[Statistic] = ()) -> None:
        self.criterion = MagnitudeSparsifier().criterion if criterion is None else criterion
        self.needs = frozenset(needs)

    def measure(self, seen: Seen) -> Tensor:
        """Scores, [groups, out, in]."""
        return self.criterion(seen.weight, seen.stats)

    def levels(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> Levels:
        """See `Allocation.levels`."""
        return allocation.global_ranking(weights, level, measured)


class LeastError(MeasuredAllocation):
    """The least sum of layer errors, see `allocation.by_sensitivity`.

    Each weight is solved at some levels on the inputs of the dense model; its error is
    ||(W - V) X||^2 / ||W X||^2, which is 1 where all of it goes.

    Args:
        tried: levels to solve at, each in (0, 1).
    """

    needs: frozenset[Statistic] = frozenset({"gram"})
    solves = True

    def __init__(self, tried: Iterable[float] = (0.25, 0.5, 0.75, 0.9)) -> None:
        self.tried = tuple(tried)
        if not all(0 < level < 1 for level in self.tried):
            raise ValueError(f"tried: expected levels between 0 and 1, found {self.tried}")

    def measure(self, seen: Seen) -> dict[float, float]:
        """Level -> error."""
        errors = {1.0: 1.0}
        for level in self.tried:
            solved = seen.method.solve(seen.weight.clone(), seen.stats, seen.tiling, level)
            kept = torch.where(solved.mask, solved.weight, 0.0)
            errors[level] = relative_error(seen.weight, kept, seen.stats) ** 2
        return errors

    def levels(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> Levels:
        """See `Allocation.levels`."""
        return allocation.by_sensitivity(weights, level, measured)
