"""The verb `search`: which level and pattern each weight gets, so that the model meets a budget."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.pruning.allocation.rules import Change, divergence
from fx_sparsity.pruning.evaluation import Evaluation
from fx_sparsity.pruning.frontier import Choice, Frontier, Option
from fx_sparsity.pruning.gradients import Loss
from fx_sparsity.pruning.methods import CalibratedSparsifier
from fx_sparsity.pruning.methods.calibrated import Sequential
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.probe import Candidates, Probe, probing
from fx_sparsity.pruning.prune import PruneOptions
from fx_sparsity.pruning.pruner import CalibrationError
from fx_sparsity.pruning.sensitivity import (
    CANDIDATES,
    Candidate,
    Sensitivity,
    WeightSensitivity,
    measure,
)
from fx_sparsity.pruning.sparsity_plan import (
    Budget,
    BudgetError,
    Cost,
    Front,
    PlannedWeight,
    Point,
    SparsityPlan,
)

_log = logging.getLogger(__name__)
SHARES = (0.0, 0.5, 1.0)
"""How far effects are drawn to those of all weights, in turn: not at all, half, and wholly, which
comes to one level for all."""
_POINTS = 8
"""Of the front."""


def search(
    model: nn.Module,
    sparsifier: CalibratedSparsifier,
    batches: Iterable[ExampleInputs],
    evaluation: Evaluation,
    budget: Budget,
    *,
    evaluations: int = 6,
    sensitivity: Sensitivity | None = None,
    candidates: Candidates = CANDIDATES,
    change: Change = divergence,
    tokens: int | None = None,
    sequential: Sequential | None = None,
    dynamic_shapes: Any = None,
    loss: Loss | None = None,
    token_weights: Iterable[Tensor] | None = None,
    all_experts: bool = False,
    progress: bool = True,
) -> SparsityPlan:
    """Find which level and pattern each weight is to get, so that the model meets a budget.

    What pruning does to the output of the model is measured for each weight alone, see
    `sensitivity`. From these effects, and what they save, plans follow without running the model:
    each weight gets what costs least at a common price of a unit saved (see `Frontier`). What
    weights do together is not the sum of what they do alone. So there are three kinds of plans: by
    the effects, by effects drawn half way to those of all weights, and by those alone, which gives
    all weights one level. The model is truly pruned by them, each is evaluated, and the best is
    taken. For a score, that is done in the middle between dense and the most that there is, and by
    the best kind the cost is then halved again and again between what meets the budget and what
    does not.

    The model is as it was afterwards, whatever is raised; hand the plan's mapping to `prune`, with
    the same batches. What `reconstruction=` would add is not foreseen. What `sensitivity` raises
    goes through, and what the evaluation does, with a note on which plan it was.

    Args:
        model: as `prune` takes it, without masks; no ExportedProgram.
        sparsifier: that is to prune it; not changed.
        batches: as `prune` takes them.
        evaluation: a score of the model, such as `perplexity(held_out)`.
        budget: what the plan has to meet.
        evaluations: most calls of the evaluation, that of the dense model among them; 2 or more.
        sensitivity: measured before on this model; None measures it.
        candidates: see `sensitivity`, where that is not given.
        change: see `sensitivity`, where that is not given.
        tokens: see `sensitivity`, where that is not given; a budget of milliseconds needs them.
        sequential: as `prune` takes it.
        dynamic_shapes: as `prune` takes it.
        loss: as `prune` takes it.
        token_weights: as `prune` takes it.
        all_experts: as `prune` takes it.
        progress: as `prune` takes it.

    Raises:
        BudgetError: no plan that was tried meets the budget; it has the nearest one.
        TypeError: `evaluation` is none, or gives no number; or as for `sensitivity`.
        CalibrationError: the score of the dense model is NaN; or as for `sensitivity`.
        ValueError: fewer than two evaluations, milliseconds without `tokens`, or a `sensitivity` of
            other weights; or as for `sensitivity`.
    """
    start = time.perf_counter()
    if not isinstance(evaluation, Evaluation):
        raise TypeError(
            f"evaluation: expected an Evaluation, found {type(evaluation).__name__}; of a function "
            'of the model, pass Evaluation(function, better="higher") or "lower"'
        )
    if evaluations < 2:
        raise ValueError(f"evaluations: expected 2 or more, found {evaluations!r}")
    timed = sensitivity.tokens if sensitivity is not None else tokens
    if budget.cost == "milliseconds" and timed is None:
        raise ValueError("tokens: a budget of milliseconds needs the number of tokens in a call")
    options = PruneOptions(
        sequential=sequential,
        dynamic_shapes=dynamic_shapes,
        loss=loss,
        token_weights=token_weights,
        all_experts=all_experts,
        progress=progress,
    )
    wanted = candidates if sensitivity is None else sensitivity.candidates_of
    with probing(model, sparsifier, batches, wanted, options) as probe:
        if sensitivity is None:
            sensitivity = measure(probe, change, tokens)
        elif missing := sorted(set(sensitivity) - set(probe.plans)):
            raise ValueError(
                f"sensitivity: the model has no weight {missing[0]} that may be pruned; measure it "
                "anew"
            )
        return _Search(probe, sensitivity, evaluation, budget, evaluations, start).plan()


class _Search:
    """Plans of one model, and their scores.

    Args:
        probe: the model.
        measured: of its weights.
        evaluation: scores it.
        budget: to meet.
        most: calls of the evaluation.
        start: of the search, by `time.perf_counter`.
    """

    def __init__(
        self,
        probe: Probe,
        measured: Sensitivity,
        evaluation: Evaluation,
        budget: Budget,
        most: int,
        start: float,
    ) -> None:
        self._probe, self._measured, self._evaluation = probe, measured, evaluation
        self._budget, self._most, self._start = budget, most, start
        self._frontiers = [Frontier(_options(measured, budget.cost, share)) for share in SHARES]
        self._other = measured.other_bytes if budget.cost == "bytes" else 0
        self._tried: list[Point] = []
        self._line: list[Point] = []  # of one kind
        self._kind = 0
        self._unpruned = self._point(dict.fromkeys(measured, 0))

    def plan(self) -> SparsityPlan:
        """The plan that meets the budget and was really seen to.

        Raises:
            BudgetError: there is none.
        """
        self._unpruned = self._evaluated(self._unpruned)
        assert self._unpruned.score is not None
        if math.isnan(self._unpruned.score):
            raise CalibrationError(
                f"the {self._evaluation.name} of the dense model is NaN: look at the evaluation "
                "and its data"
            )
        best = self._cheapest() if self._budget.limit is None else self._within(self._budget.limit)
        return self._planned(best)

    def _within(self, limit: float) -> Point:
        """The best of all kinds of plans that cost so much."""
        low = self._frontiers[0].bounds[0] + self._other
        if low > limit:
            nearest = self._planned(self._evaluated(self._at(0, low)))
            raise BudgetError(
                f"the least that the candidates come to is {low:.6g} {self._budget.cost}, the "
                f"budget is {limit:.6g}",
                nearest,
            )
        found = self._compared(limit)
        if _is_nan(found):
            raise BudgetError(
                "no plan that was tried has a score that is a number", self._planned(found)
            )
        return found

    def _cheapest(self) -> Point:
        """What costs least of all that was seen to meet a score."""
        wanted, unpruned = self._budget.score, self._unpruned
        assert wanted is not None
        assert unpruned.score is not None
        meets = self._evaluation.meets
        if not meets(unpruned.score, wanted):
            raise BudgetError(
                f"the dense model has {self._evaluation.name} {unpruned.score:.6g}, the budget is "
                f"{wanted:.6g}",
                self._planned(unpruned),
            )
        low, high = (bound + self._other for bound in self._frontiers[0].bounds)
        middle = (low + high) / 2
        found = self._compared(middle)
        for _ in range(self._most - len(self._tried)):
            assert found.score is not None
            low, high = (low, middle) if meets(found.score, wanted) else (middle, high)
            middle = (low + high) / 2
            found = self._evaluated(self._at(self._kind, middle))
            self._line.append(found)
        pruned = self._tried[1:]
        met = [p for p in pruned if p.score is not None and meets(p.score, wanted)]
        if not met:
            nearest = min(pruned or [unpruned], key=self._loss)
            raise BudgetError(
                f"no pruned model that was tried meets {self._evaluation.name} {wanted:.6g}; allow "
                "more evaluations, or offer lower levels",
                self._planned(nearest),
            )
        return min(met, key=lambda point: (self._cost(point), self._loss(point)))

    def _compared(self, limit: float) -> Point:
        """The best of as many kinds of plans as may be evaluated; `_kind` is its kind."""
        points = [
            self._evaluated(self._at(kind, limit))
            for kind in range(min(len(SHARES), self._most - len(self._tried)))
        ]
        self._kind = min(range(len(points)), key=lambda kind: self._loss(points[kind]))
        self._line = [self._unpruned, points[self._kind]]
        return points[self._kind]

    def _at(self, kind: int, limit: float) -> Point:
        """The plan of one kind that costs at most so much."""
        frontier = self._frontiers[kind]
        return self._point(frontier.within(max(limit - self._other, frontier.bounds[0])))

    def _evaluated(self, point: Point) -> Point:
        """The score of the model truly pruned; of a plan that was evaluated, that again."""
        for tried in self._tried:
            if tried.configs == point.configs:
                return tried
        chosen: dict[str, Plan] = {}
        for fqn, config in point.configs.items():
            if config is not None:
                chosen[fqn] = next(p for p in self._probe.plans[fqn] if str(p.config) == config)
        with self._probe.pruned(chosen):
            score = self._score(point)
        _log.info("%s %.6g at %d bytes", self._evaluation.name, score, point.bytes)
        self._tried.append(replace(point, score=score))
        return self._tried[-1]

    def _score(self, point: Point) -> float:
        """Of a model that is pruned by a plan."""
        model = self._probe.frame.model
        modes = [(module, module.training) for module in model.modules()]
        try:
            return self._evaluation(model)
        except BaseException as error:
            error.add_note(
                f"while evaluating a plan of {point.bytes} bytes, which prunes {point.pruned} of "
                f"{len(point.configs)} weights; the model is as it was"
            )
            raise
        finally:
            for module, training in modes:
                module.training = training

    def _point(self, choice: Choice) -> Point:
        """The figures of a choice, by what was measured."""
        measured = self._measured
        configs: dict[str, str | None] = dict.fromkeys(measured)
        effect, nbytes, milliseconds = 0.0, measured.other_bytes, 0.0
        for row in measured.rows:
            chosen = row.candidates[choice[row.fqn] - 1] if choice[row.fqn] else None
            if chosen is not None:
                configs[row.fqn] = chosen.config
                effect += chosen.effect
            nbytes += (chosen or row).bytes
            milliseconds += (chosen or row).milliseconds or 0.0
        return Point(configs, effect, nbytes, None if measured.tokens is None else milliseconds)

    def _planned(self, point: Point) -> SparsityPlan:
        """All that there is to tell of a plan."""
        rows = []
        dense = dict(self._measured.dense)
        for row in self._measured.rows:
            config = point.configs[row.fqn]
            if config is None:
                dense[row.fqn] = "pruning it does more than it saves, next to the others"
                continue
            found = next(c for c in row.candidates if c.config == config)
            figures = (found.effect, found.bytes, found.milliseconds)
            rows.append(PlannedWeight(row.fqn, config, *figures))
        return SparsityPlan(
            rows=tuple(rows),
            dense=dense,
            point=point,
            unpruned=self._unpruned,
            front=self._front(),
            name=self._evaluation.name,
            evaluations=len(self._tried),
            notes=(*self._measured.notes, *self._doubts()),
            seconds=time.perf_counter() - self._start,
        )

    def _front(self) -> Front:
        """Choices of the least effect, all along the frontier, and those that were evaluated."""
        low, high = (bound + self._other for bound in self._frontiers[0].bounds)
        limits = [low + (high - low) * place / (_POINTS - 1) for place in range(_POINTS)]
        points = [*self._tried, *(self._at(0, limit) for limit in limits)]
        unique = {tuple(point.configs.values()): point for point in reversed(points)}
        return Front(tuple(sorted(unique.values(), key=self._cost, reverse=True)))

    def _doubts(self) -> list[str]:
        """What was strange of the scores."""
        name, doubts = self._evaluation.name, []
        if lost := sum(map(_is_nan, self._tried)):
            doubts.append(
                f"{name} was NaN for {lost} of {len(self._tried)} plans, which count as worst"
            )
        line = sorted(self._line, key=self._cost, reverse=True)
        for denser, sparser in pairwise(line):
            if self._loss(sparser) < self._loss(denser) and self._cost(sparser) < self._cost(
                denser
            ):
                doubts.append(
                    f"{name} is not monotone: {denser.score:.4g} at {denser.bytes} bytes, "
                    f"{sparser.score:.4g} at {sparser.bytes}; a plan between them may be missed"
                )
        return doubts

    def _cost(self, point: Point) -> float:
        if self._budget.cost == "bytes":
            return point.bytes
        assert point.milliseconds is not None
        return point.milliseconds

    def _loss(self, point: Point) -> float:
        assert point.score is not None
        return self._evaluation.loss(point.score)


def _options(measured: Sensitivity, cost: Cost, share: float) -> dict[str, list[Option]]:
    """FQN -> the weight as it is, and its candidates.

    Args:
        measured: effects and costs.
        cost: which.
        share: how far the effect of a candidate is drawn to that which it has an element, over all
            weights.
    """
    effects: dict[str, float] = defaultdict(float)
    elements: dict[str, int] = defaultdict(int)
    for row in measured.rows:
        for found in row.candidates:
            effects[found.config] += found.effect
            elements[found.config] += row.elements
    return {
        row.fqn: [
            Option(0.0, _figure(row, cost)),
            *(
                Option(
                    (1 - share) * max(found.effect, 0.0)
                    + share
                    * max(effects[found.config], 0.0)
                    * row.elements
                    / elements[found.config],
                    _figure(found, cost),
                )
                for found in row.candidates
            ),
        ]
        for row in measured.rows
    }


def _figure(row: WeightSensitivity | Candidate, cost: Cost) -> float:
    return row.bytes if cost == "bytes" else row.milliseconds or 0.0


def _is_nan(point: Point) -> bool:
    return point.score is not None and math.isnan(point.score)
