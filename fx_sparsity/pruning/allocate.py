"""One level for a whole model, spread over its weights before any of them is pruned."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.allocation import Allocation, MeasuredAllocation, Seen
from fx_sparsity.pruning.allocation.levels import Prunable
from fx_sparsity.pruning.methods import CalibratedSparsifier, Solution, Statistics
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.pruner import Pruner


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


def measure(measuring: Measuring, pruner: Pruner, steps: Iterable[str]) -> dict[str, Any]:
    """What a rule measures of each weight of the dense model.

    Args:
        measuring: the rule and the method.
        pruner: that shows it the weights, see `Pruner.looking`.
        steps: FQN after FQN, when the pruner has all inputs of the weight.

    Returns:
        FQN -> what was measured; weights that cannot be pruned are left out.
    """
    measured: dict[str, Any] = {}
    for fqn in steps:
        if pruner.prune(fqn) is None:
            found, form = measuring.last, pruner.plans[fqn].form
            measured[fqn] = form.from_matrix(found) if isinstance(found, Tensor) else found
    return measured


def allocate(
    rule: Allocation,
    plans: Mapping[str, Plan],
    done: Mapping[str, tuple[Plan, int]],
    weights: WeightMap,
    measured: Mapping[str, Any],
) -> dict[str, Plan]:
    """Plans with the levels of a rule, that prune in all what the plans ask for.

    Args:
        rule: how to spread it.
        plans: FQN -> plan of every weight that is to be pruned, with the level asked for.
        done: FQN -> plan of every weight that was pruned before, and the zeros that it has.
        weights: of the model.
        measured: FQN -> what the rule has measured.

    Raises:
        ValueError: see `Allocation.levels`.
    """
    prunable = {
        fqn: Prunable(plan.form.shape, plan.config.pattern, weights[fqn].roles)
        for fqn, plan in plans.items()
    }
    asked = sum(
        plan.config.level * torch.Size(plan.form.shape).numel()
        for plan in (*plans.values(), *(plan for plan, _ in done.values()))
    )
    left = max(0, round(asked) - sum(zeros for _, zeros in done.values()))
    elements = sum(weight.elements for weight in prunable.values())
    levels = rule.levels(prunable, left / max(1, elements), measured)
    return {fqn: replace(plan, config=levels[fqn]) for fqn, plan in plans.items()}
