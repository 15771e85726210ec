"""One level for a whole model, spread over its weights before any of them is pruned."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.allocation import (
    Allocation,
    Levels,
    MeasuredAllocation,
    OutputAllocation,
    Seen,
    squared_change,
)
from fx_sparsity.pruning.allocation.levels import Prunable
from fx_sparsity.pruning.batches import Batch, Frame
from fx_sparsity.pruning.calibration import Calibration
from fx_sparsity.pruning.effect import Effect
from fx_sparsity.pruning.graph_blocks import block_of
from fx_sparsity.pruning.methods import CalibratedSparsifier, Solution, Statistic, Statistics
from fx_sparsity.pruning.methods.calibrated import Sequential
from fx_sparsity.pruning.plan import Decision, Plan
from fx_sparsity.pruning.pruner import Pruner
from fx_sparsity.pruning.stores import Store, Untouched
from fx_sparsity.pruning.trial import pruned

_log = logging.getLogger(__name__)


class Measuring(CalibratedSparsifier):
    """Has a rule measure what a method is to solve, and prunes nothing.

    Attributes:
        plan: of the weight that is next.
        last: what was measured.
    """

    plan: Plan

    def __init__(
        self, rule: MeasuredAllocation, method: CalibratedSparsifier, effect: Effect
    ) -> None:
        super().__init__()
        self.rule, self.method = rule, method
        self.last: Any = None
        self.needs = needs_of(rule, method)
        self._effect = effect

    def solve(self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float) -> Solution:
        """See `CalibratedSparsifier.solve`."""
        seen = Seen(weight, stats, tiling, self.method, self._changes)
        self.last = self.rule.measure(seen)
        return Solution(torch.ones_like(weight, dtype=torch.bool), weight)

    def _changes(self, values: Sequence[Tensor]) -> list[float]:
        """See `Seen.changes`."""
        fqn, form = self.plan.fqn, self.plan.form
        return self._effect.of([{fqn: form.from_matrix(value)} for value in values])


def needs_of(rule: Allocation | None, method: CalibratedSparsifier) -> frozenset[Statistic]:
    """Statistics that a rule measures by; none where it measures nothing."""
    if not isinstance(rule, MeasuredAllocation):
        return frozenset()
    return rule.needs | (method.needs if rule.solves else frozenset())


def allocate(
    rule: Allocation,
    pruner: Pruner,
    frame: Frame,
    decision: Decision,
    store: Store,
    batches: Sequence[Batch],
    sequential: Sequential,
    all_experts: bool,
) -> dict[str, Plan]:
    """Plans with the levels of a rule, that prune in all what the plans ask for.

    Whatever is raised, the model is as it was.

    Args:
        rule: how to spread it.
        pruner: of the plans.
        frame: of the model.
        decision: plans with the levels asked for, and those of weights that were pruned before.
        store: how the batches see those.
        batches: to measure with.
        sequential: how the plans are to be carried out, see `Calibration`.
        all_experts: see `Calibration`.

    Returns:
        Plans of all weights, or of those that can be pruned, where the rule measures.

    Raises:
        ValueError: see `Allocation.levels`.
        CalibrationError: see `Effect.of`.
    """
    plans, measured = decision.plans, dict[str, Any]()
    change = rule.change if isinstance(rule, OutputAllocation) else squared_change
    effect = Effect(frame.model, batches, decision.weights, change)
    if isinstance(rule, MeasuredAllocation) and plans:
        measuring = Measuring(rule, pruner.sparsifier, effect)
        looking = pruner.looking(measuring, plans, Untouched(store))
        steps = Calibration(frame, looking, store, batches, True, all_experts)
        with torch.no_grad():
            measured = _measure(measuring, looking, steps, block_of(frame.model, plans))
        plans = {fqn: plan for fqn, plan in plans.items() if fqn in measured}
    prunable = {
        fqn: Prunable(plan.form.shape, plan.config.pattern, frame.weights[fqn].roles)
        for fqn, plan in plans.items()
    }
    asked = sum(
        plan.config.level * torch.Size(plan.form.shape).numel()
        for plan in (*plans.values(), *decision.done.values())
    )
    masks = map(pruner.sparsifier.get_mask, decision.done)
    left = max(0, round(asked) - sum(int((mask == 0).sum()) for mask in masks))
    level = left / max(1, sum(weight.elements for weight in prunable.values()))
    if not isinstance(rule, OutputAllocation):
        return _with(plans, rule.levels(prunable, level, measured))
    candidates = [_with(plans, found) for found in rule.candidates(prunable, level, measured)]
    changes = []
    for tried in candidates:
        with pruned(pruner, tried, frame, store, batches, sequential, all_experts) as trial:
            pass  # what was written counts, beside the dense model
        changes += effect.of([trial.values])
    _log.info("the output changes by %s with the levels tried; the least is kept", changes)
    return candidates[changes.index(min(changes))]


def _with(plans: Mapping[str, Plan], levels: Levels) -> dict[str, Plan]:
    return {fqn: replace(plan, config=levels[fqn]) for fqn, plan in plans.items()}


def _measure(
    measuring: Measuring, pruner: Pruner, steps: Iterable[str], blocks: Mapping[str, str]
) -> dict[str, Any]:
    """FQN -> what a rule measures of each weight of the dense model that can be pruned.

    Args:
        measuring: the rule and the method.
        pruner: that shows it the weights, see `Pruner.looking`.
        steps: FQN after FQN, when the pruner has all inputs of the weight.
        blocks: FQN -> the block that the weight lies in, see `block_of`.
    """
    measured: dict[str, Any] = {}
    pending = Counter(blocks.values())
    parts: dict[str, dict[str, Any]] = {}
    for fqn in steps:
        measuring.plan, block = pruner.plans[fqn], blocks[fqn]
        found = parts.setdefault(block, {})
        if pruner.prune(fqn) is None:
            found[fqn] = measuring.last
        pending[block] -= 1
        if not pending[block]:
            measured.update(measuring.rule.join(parts.pop(block)))
    for found in parts.values():  # of blocks with weights that no graph shows the inputs of
        measured.update(measuring.rule.join(found))
    forms = {fqn: pruner.plans[fqn].form for fqn in measured}
    return {
        fqn: forms[fqn].from_matrix(value) if isinstance(value, Tensor) else value
        for fqn, value in measured.items()
    }
