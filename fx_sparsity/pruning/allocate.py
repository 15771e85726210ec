"""One level for a whole model, spread over its weights before any of them is pruned."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.allocation import Allocation, MeasuredAllocation, Seen
from fx_sparsity.pruning.allocation.levels import Prunable
from fx_sparsity.pruning.batches import Batch, Frame
from fx_sparsity.pruning.calibration import Calibration
from fx_sparsity.pruning.methods import CalibratedSparsifier, Solution, Statistics
from fx_sparsity.pruning.plan import Decision, Plan
from fx_sparsity.pruning.pruner import Pruner, Store


class Measuring(CalibratedSparsifier):
    """Has a rule measure what a method is to solve, and prunes nothing.

    Attributes:
        last: what was measured.
    """

    def __init__(self, rule: MeasuredAllocation, method: CalibratedSparsifier) -> None:
        super().__init__()
        self.rule, self.method = rule, method
        self.last: Any = None
        self.needs = rule.needs | (method.needs if rule.solves else frozenset())

    def solve(self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float) -> Solution:
        """See `CalibratedSparsifier.solve`."""
        self.last = self.rule.measure(Seen(weight, stats, tiling, self.method))
        return Solution(torch.ones_like(weight, dtype=torch.bool), weight)


def allocate(
    rule: Allocation,
    measuring: Measuring | None,
    pruner: Pruner,
    frame: Frame,
    decision: Decision,
    store: Store,
    batches: Sequence[Batch],
) -> dict[str, Plan]:
    """Plans with the levels of a rule, that prune in all what the plans ask for.

    Args:
        rule: how to spread it.
        measuring: the rule and the method, where the rule measures.
        pruner: of the plans.
        frame: of the model.
        decision: plans with the levels asked for, and those of weights that were pruned before.
        store: how the batches see those.
        batches: to measure with.

    Returns:
        Plans of all weights, or of those that can be pruned, where the rule measures.

    Raises:
        ValueError: see `Allocation.levels`.
    """
    plans, measured = decision.plans, dict[str, Any]()
    if measuring is not None and plans:
        looking = pruner.looking(measuring)
        with torch.no_grad():
            measured = _measure(measuring, looking, Calibration(frame, looking, store, batches))
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
    elements = sum(weight.elements for weight in prunable.values())
    levels = rule.levels(prunable, left / max(1, elements), measured)
    return {fqn: replace(plan, config=levels[fqn]) for fqn, plan in plans.items()}


def _measure(measuring: Measuring, pruner: Pruner, steps: Iterable[str]) -> dict[str, Any]:
    """FQN -> what a rule measures of each weight of the dense model that can be pruned.

    Args:
        measuring: the rule and the method.
        pruner: that shows it the weights, see `Pruner.looking`.
        steps: FQN after FQN, when the pruner has all inputs of the weight.
    """
    measured: dict[str, Any] = {}
    for fqn in steps:
        if pruner.prune(fqn) is None:
            found, form = measuring.last, pruner.plans[fqn].form
            measured[fqn] = form.from_matrix(found) if isinstance(found, Tensor) else found
    return measured
