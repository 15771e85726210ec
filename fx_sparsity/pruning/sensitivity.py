"""What pruning each weight alone does to the output of a model, and what it saves."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.weight_map import WeightSite
from fx_sparsity.patterns import SparsityConfig, Tiling
from fx_sparsity.progress import progress as show_progress
from fx_sparsity.pruning.allocation.rules import Change, divergence
from fx_sparsity.pruning.calibration import Calibration
from fx_sparsity.pruning.costs import COSTS
from fx_sparsity.pruning.effect import Effect
from fx_sparsity.pruning.gradients import Loss
from fx_sparsity.pruning.methods import CalibratedSparsifier, Solution, Statistics
from fx_sparsity.pruning.methods.where import select
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.probe import Candidates, Probe, probing
from fx_sparsity.pruning.prune import PruneOptions
from fx_sparsity.pruning.report import PrunedWeight
from fx_sparsity.pruning.stores import Untouched
from fx_sparsity.quantization.torchao_tensors import within
from fx_sparsity.reports import Bytes, Table, WeightReport

CANDIDATES = (
    *(f"unstructured {percent}%" for percent in range(30, 100, 10)),
    *("2:4", "4:8", "rows 25%", "rows 50%"),
)
"""What each weight may become, by default."""


@dataclass(frozen=True)
class Candidate:
    """One weight pruned in one way, and all others dense.

    Attributes:
        config: as `SparsityConfig.parse` reads it.
        effect: change of the model's output, summed over the batches, see `Change`.
        bytes: that `fx_sparsity.save` writes of the weight.
        milliseconds: of a call of its layer as `fx_sparsity.lower` would have it; None where that
            was not measured, or no kernel is for the weight.
    """

    config: str
    effect: float
    bytes: int
    milliseconds: float | None


@dataclass(frozen=True)
class WeightSensitivity:
    """One weight.

    Attributes:
        fqn: of the weight.
        elements: of the weight.
        tokens: of its inputs, of all groups.
        bytes: that `fx_sparsity.save` writes of it as it is.
        milliseconds: of a call of its layer as it is; None as for a candidate.
        candidates: what it may become.
    """

    fqn: str
    elements: int
    tokens: int
    bytes: int
    milliseconds: float | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Sensitivity(WeightReport[WeightSensitivity]):
    """FQN -> `WeightSensitivity`, in the order of the graph.

    Attributes:
        rows: of every weight that may be pruned.
        dense: FQN -> the reason why not, of the others.
        other_bytes: that `fx_sparsity.save` writes of everything else in the model's state.
        tokens: in the call that milliseconds are of; None where none was measured.
        batches: that were run.
        notes: what a user should know, such as inputs too few for a weight.
        seconds: that it took.
    """

    rows: tuple[WeightSensitivity, ...]
    dense: Mapping[str, str]
    other_bytes: int
    tokens: int | None
    batches: int
    notes: tuple[str, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        """That `fx_sparsity.save` writes of the model as it is, without the file's header."""
        return self.other_bytes + sum(row.bytes for row in self.rows)

    def candidates_of(self, site: WeightSite) -> list[str]:
        """What was measured of a weight; nothing of one that stays dense."""
        return [
            found.config for row in self.rows if row.fqn == site.fqn for found in row.candidates
        ]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Sensitivity":
        """Read what `to_dict` wrote."""
        rows = tuple(
            WeightSensitivity(
                **{**row, "candidates": tuple(Candidate(**found) for found in row["candidates"])}
            )
            for row in data["rows"]
        )
        return cls(**{**data, "rows": rows, "notes": tuple(data["notes"])})

    @property
    def tables(self) -> tuple[Table, ...]:
        """The effects of each candidate on each weight, and what stays dense if anything does."""
        configs = list(dict.fromkeys(c.config for row in self.rows for c in row.candidates))
        lines = []
        for row in self.rows:
            effects = {candidate.config: candidate.effect for candidate in row.candidates}
            known = (row.fqn, row.tokens, Bytes(row.bytes), row.milliseconds)
            lines.append((*known, *map(effects.get, configs)))
        found = Table(("weight", "tokens", "bytes", "ms", *configs), lines)
        dense = Table(("stays dense", "reason"), list(self.dense.items()))
        return (found, dense) if self.dense else (found,)

    @property
    def summary(self) -> str:
        """What it was measured with."""
        return f"{self.batches} batches, {self.seconds:.1f} s; {self.other_bytes} bytes of the rest"

    def __str__(self) -> str:
        last = "\n".join([*self.notes, self.summary])
        return "\n\n".join([*map(str, self.tables), last])


def sensitivity(
    model: nn.Module,
    sparsifier: CalibratedSparsifier,
    batches: Iterable[ExampleInputs],
    *,
    candidates: Candidates = CANDIDATES,
    change: Change = divergence,
    tokens: int | None = None,
    dynamic_shapes: Any = None,
    loss: Loss | None = None,
    token_weights: Iterable[Tensor] | None = None,
    all_experts: bool = False,
    progress: bool = True,
) -> Sensitivity:
    """Measure what pruning each weight alone does to the output of a model, and what it saves.

    The batches walk through the model's graph once, or, where patterns order the columns of a
    convolution differently, once for each order. Where the inputs of a weight are known, it is
    solved for each candidate, and the batches run through the model with that weight alone pruned:
    one run over all batches for each candidate, and one of the dense model for each weight. In
    memory is one weight, as often as it has candidates; no batch is copied. Weights, buffers, mode
    and random state are as before afterwards, whatever is raised.

    Args:
        model: as `prune` takes it, without masks.
        sparsifier: that is to prune it; not changed.
        batches: as `prune` takes them.
        candidates: what each weight may become, besides dense; or a function of its `WeightSite`,
            which returns nothing for a weight that stays dense.
        change: how far two outputs are apart. The default is for models that return logits; others
            take `squared_change`.
        tokens: rows of activations in a call, to measure milliseconds with; None measures none.
        dynamic_shapes: as `prune` takes it.
        loss: as `prune` takes it.
        token_weights: as `prune` takes it.
        all_experts: as `prune` takes it.
        progress: True shows a bar on a terminal and log lines elsewhere, False nothing.

    Raises:
        InputError: as for `prune`.
        TypeError: `model` is no module, or the sparsifier needs no data.
        MaskError: the model or the sparsifier has masks, or a weight cannot be masked.
        CalibrationError: as for `prune`, or outputs are not finite.
        ValueError: as for `prune`, or `tokens` is not positive.
    """
    options = PruneOptions(
        dynamic_shapes=dynamic_shapes,
        loss=loss,
        token_weights=token_weights,
        all_experts=all_experts,
        progress=progress,
    )
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens: expected a positive integer, found {tokens!r}")
    with probing(model, sparsifier, batches, candidates, options) as probe:
        return measure(probe, change, tokens)


def measure(probe: Probe, change: Change, tokens: int | None) -> Sensitivity:
    """What `sensitivity` does, for a model that is ready to be tried."""
    start = time.perf_counter()
    model, weights = probe.frame.model, probe.decision.weights
    effect = Effect(model, probe.batches, {fqn: weights[fqn] for fqn in probe.plans}, change)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    found: dict[str, _Found] = {fqn: _Found({}) for fqn in probe.plans}
    dense = dict(probe.decision.dense)
    notes: dict[str, list[str]] = {}
    rounds = _rounds(probe.plans)
    total, show = sum(map(len, rounds)), probe.options.progress
    with torch.no_grad(), show_progress("measuring", total, show) as advance:
        for plans in rounds:
            showing = _Showing(probe.pruner.sparsifier)
            first = {fqn: alike[0] for fqn, alike in plans.items()}
            looking = probe.pruner.looking(showing, first, Untouched(probe.store))
            how = (True, probe.options.all_experts)
            for fqn in Calibration(probe.frame, looking, probe.store, probe.batches, *how):
                showing.plans = plans[fqn]
                reason = looking.prune(fqn)
                if reason is None:
                    values = [value.to(weights[fqn].dtype) for value in showing.take()]
                    effects = effect.of([{fqn: value} for value in values])
                    forms = [weights[fqn].detach(), *values]
                    times: Sequence[float] | None = None
                    if tokens is not None:
                        site = probe.frame.weights[fqn]
                        times = COSTS.layer_time(site, forms, tokens, nbytes)
                    found[fqn].add(plans[fqn], effects, forms, times)
                else:
                    dense[fqn] = reason
                advance(fqn, 1)
            for row in looking.pruned:
                found[row.fqn].tokens = row.tokens
                for note in (*row.notes, *_few(row, first[row.fqn], showing)):
                    if row.fqn not in notes.setdefault(note, []):
                        notes[note].append(row.fqn)
    return Sensitivity(
        rows=tuple(
            one.row(fqn, weights[fqn].numel(), probe.plans[fqn])
            for fqn, one in found.items()
            if one.candidates
        ),
        dense=dense,
        other_bytes=_other_bytes(model, [weights[fqn] for fqn in found if found[fqn].candidates]),
        tokens=tokens,
        batches=len(probe.batches),
        notes=(*probe.notes, *(f"{note}: {_some(fqns)}" for note, fqns in notes.items())),
        seconds=time.perf_counter() - start,
    )


@dataclass
class _Found:
    """What was measured of one weight so far."""

    candidates: dict[SparsityConfig, Candidate]
    tokens: int = 0
    bytes: int = 0
    milliseconds: float | None = None

    def add(
        self,
        plans: Sequence[Plan],
        effects: Sequence[float],
        forms: Sequence[Tensor],
        times: Sequence[float] | None,
    ) -> None:
        """Take in some candidates; forms and times are of the dense weight first."""
        self.bytes, *sizes = map(COSTS.stored_bytes, forms)
        self.milliseconds, *taken = [None] * len(forms) if times is None else times
        for plan, effect, size, ms in zip(plans, effects, sizes, taken, strict=True):
            self.candidates[plan.config] = Candidate(str(plan.config), effect, size, ms)

    def row(self, fqn: str, elements: int, plans: Sequence[Plan]) -> WeightSensitivity:
        """All candidates, in the order in which they were given."""
        candidates = tuple(self.candidates[plan.config] for plan in plans)
        figures = (elements, self.tokens, self.bytes, self.milliseconds)
        return WeightSensitivity(fqn, *figures, candidates)


class _Showing(CalibratedSparsifier):
    """Solves a weight for several plans, and prunes nothing.

    Attributes:
        plans: of the weight that is next.
    """

    plans: Sequence[Plan]

    def __init__(self, method: CalibratedSparsifier) -> None:
        super().__init__()
        self._method, self._values = method, list[Tensor]()
        self.needs = method.needs

    def solve(self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float) -> Solution:
        """See `CalibratedSparsifier.solve`."""
        for plan in self.plans:
            form = plan.form
            found = self._method.solve(weight.clone(), stats, form.tiling, plan.config.level)
            self._values.append(form.from_matrix(select(found.mask, found.weight)))
        return Solution(torch.ones_like(weight, dtype=torch.bool), weight)

    def take(self) -> list[Tensor]:
        """The values of the last weight, of its shape; they are not held any more."""
        values, self._values = self._values, []
        return values


def _rounds(plans: Mapping[str, Sequence[Plan]]) -> list[dict[str, list[Plan]]]:
    """Plans that go by the same columns of a weight, and so by the same statistics, together."""
    rounds: list[dict[str, list[Plan]]] = []
    for fqn, own in plans.items():
        alike: dict[tuple[object, ...], list[Plan]] = {}
        for plan in own:
            form = plan.form
            alike.setdefault((form.split, form.order, form.sizes, form.places), []).append(plan)
        for place, group in enumerate(alike.values()):
            if place == len(rounds):
                rounds.append({})
            rounds[place][fqn] = group
    return rounds


def _few(row: PrunedWeight, plan: Plan, method: CalibratedSparsifier) -> list[str]:
    """A note where a weight saw fewer inputs than it has columns, which a method goes by."""
    if plan.table or not method.needs or "gram" in method.needs or row.fewest >= plan.form.width:
        return []
    return [f"{row.fewest} inputs for {plan.form.width} columns: calibrate on more data"]


def _some(fqns: Sequence[str]) -> str:
    rest = len(fqns) - 3
    return ", ".join(fqns[:3]) + (f" and {rest} more" if rest > 0 else "")


def _other_bytes(model: nn.Module, weights: Sequence[Tensor]) -> int:
    """Bytes of a model's state in a file, but for some weights; tied tensors count once."""
    seen = {weight.data_ptr() for weight in weights}
    total = 0
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            place = within(tensor)[0].data_ptr()
            if not (tensor.numel() and place in seen):
                seen.add(place)
                total += COSTS.stored_bytes(tensor)
    return total
