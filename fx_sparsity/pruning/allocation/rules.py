"""Rules that spread one level over the weights of a model; `prune` takes one as `allocation`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.allocation import levels as allocation
from fx_sparsity.pruning.allocation.levels import Levels, Prunable
from fx_sparsity.pruning.methods.calibrated import CalibratedSparsifier
from fx_sparsity.pruning.methods.criterion import Criterion, MagnitudeSparsifier
from fx_sparsity.pruning.methods.groups import required
from fx_sparsity.pruning.methods.statistics import Statistic, Statistics


class Seen(NamedTuple):
    """What a rule sees of one weight of the dense model, in matrix form.

    Attributes:
        weight: float32, [groups, out, in].
        stats: with everything that the rule needs.
        tiling: its pattern.
        method: that is to prune it.
        changes: values of the weight, float32 [groups, out, in] each -> what each of them in its
            place does to the model's output, see `OutputAllocation`.
    """

    weight: Tensor
    stats: Statistics
    tiling: Tiling
    method: CalibratedSparsifier
    changes: Callable[[Sequence[Tensor]], list[float]]


Change = Callable[[Tensor, Tensor], Tensor]
"""(what the dense model returns, what another does) -> how far apart they are, a scalar >= 0."""


def squared_change(dense: Tensor, found: Tensor) -> Tensor:
    """Squared difference of two outputs of one shape, summed: float32, a scalar."""
    moved = found.float() - dense.float()
    return torch.where(dense == found, 0.0, moved).square().sum()  # also where both are -inf


def divergence(dense: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the classes that logits give, summed: float32, a scalar.

    Args:
        dense: logits, [..., classes].
        found: those of another model, in that shape.

    Raises:
        ValueError: a single class, which always has all of the probability.
    """
    if dense.shape[-1] < 2:
        raise ValueError(
            f"divergence: expected logits of several classes, found shape {tuple(dense.shape)}; "
            "use squared_change for models that return other values"
        )
    p, q = dense.float().log_softmax(-1), found.float().log_softmax(-1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum()  # 0 log 0 is 0


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
            measured: FQN -> what `MeasuredAllocation.join` returned, tensors of [groups, out, in]
                turned into the weight's own shape; empty for rules that measure nothing.

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
        """What `join` is to know of a weight; held for those of one block at once."""

    def join(self, measured: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `levels` is to know of the weights of one block; held for all of them at once.

        Args:
            measured: FQN -> what `measure` returned, for all weights of the block that can be
                pruned; see `block_of`.

        Returns:
            FQN -> anything for each of them; by default what was measured.
        """
        return measured


class OutputAllocation(MeasuredAllocation):
    """Base of rules that go by what the model returns. Override `candidates`, too.

    What counts is the first floating tensor that the model returns, without scalars such as a loss,
    and without padding.

    Attributes:
        change: how far an output is from that of the dense model; sums over tokens and batches.
    """

    change: Change

    @abstractmethod
    def candidates(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> list[Levels]:
        """Levels to prune by in turn, of which those are kept that change the output least.

        See `Allocation.levels`; of those that change it alike, the first.
        """


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
    """Less from blocks with many outliers among their Wanda scores (arXiv 2310.05175).

    All weights of a block, such as a layer of a transformer, get one level. Holds the scores of one
    block.

    Args:
        spread: see `allocation.owl`.
        multiple: of the mean score of a block, from which on a score is an outlier.
    """

    needs: frozenset[Statistic] = frozenset({"input_norm"})

    def __init__(self, spread: float = 0.08, multiple: float = 5.0) -> None:
        self.spread, self.multiple = spread, multiple

    def measure(self, seen: Seen) -> Tensor:
        """Wanda scores, [groups, out, in]: |W| times the root mean square of its inputs.

        Of arXiv 2306.11695, eq. 1, divided by the root of the number of tokens, so that experts
        that meet fewer are scored alike.
        """
        tokens = seen.stats.tokens.clamp(min=1).unsqueeze(1)
        means = required(seen.stats, "squares") / tokens
        return seen.weight.abs() * means.sqrt().unsqueeze(1)

    def join(self, measured: Mapping[str, Any]) -> Mapping[str, Any]:
        """Share of outliers, the same for all weights of the block."""
        return dict.fromkeys(
            measured, allocation.outlier_ratio([*measured.values()], self.multiple)
        )

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


class LeastError(OutputAllocation):
    """The least sum of what pruning single weights does to the output, and never behind uniform.

    Each weight is solved at some levels on the inputs of the dense model, and the batches run
    through the model with that weight alone pruned; see `allocation.by_sensitivity`. What weights
    do together is not that sum. So the model is pruned by these levels, by one level everywhere,
    and by the means of both in turn, without corrections of biases or blocks, and the levels are
    kept that change its output least.

    The cost: `len(tried) + 2` runs of the model over all batches for each weight, and then three
    times what pruning takes and six runs more; in memory, two copies of the weights that are
    pruned.

    Args:
        tried: levels to solve at, each in (0, 1).
        change: see `OutputAllocation`. The default is for models that return logits; others take
            `squared_change`, which is a bad guide for logits.

    Raises:
        ValueError: a level of `tried` is not between 0 and 1.
    """

    solves = True

    def __init__(
        self, tried: Iterable[float] = (0.4, 0.6, 0.75, 0.9), change: Change = divergence
    ) -> None:
        self.tried, self.change = tuple(tried), change
        if not all(0 < level < 1 for level in self.tried):
            raise ValueError(f"tried: expected levels between 0 and 1, found {self.tried}")

    def measure(self, seen: Seen) -> dict[float, float]:
        """Level -> change of the output."""
        kept = {1.0: torch.zeros_like(seen.weight)}
        for level in self.tried:
            solved = seen.method.solve(seen.weight.clone(), seen.stats, seen.tiling, level)
            kept[level] = torch.where(solved.mask, solved.weight, 0.0)
        return dict(zip(kept, seen.changes([*kept.values()]), strict=True))

    def levels(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> Levels:
        """See `Allocation.levels`."""
        return allocation.by_sensitivity(weights, level, measured)

    def candidates(
        self, weights: Mapping[str, Prunable], level: float, measured: Mapping[str, Any]
    ) -> list[Levels]:
        """See `OutputAllocation.candidates`."""
        even, least = allocation.uniform(weights, level), self.levels(weights, level, measured)
        return [even, allocation.halfway(weights, level, even, least), least]
