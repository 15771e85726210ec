"""One weight is the unit of change: its statistics, its solution, and the writing of it."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.weight_inputs import WeightInputs
from fx_sparsity.pruning.collect import Collector
from fx_sparsity.pruning.gradients import Gradients
from fx_sparsity.pruning.held_out import damped
from fx_sparsity.pruning.methods import CalibratedSparsifier, Solution, Statistic, Statistics
from fx_sparsity.pruning.methods.statistics import relative_error
from fx_sparsity.pruning.methods.where import select
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.report import PrunedWeight
from fx_sparsity.pruning.stores import Solved, Store

_EXPERT = re.compile(r"(?:^|[._])experts?[._]")


class CalibrationError(FxSparsityError, ValueError):
    """Calibration data, or what a method makes of it, cannot be used; the weight is named."""


class Pruner:
    """Collects statistics of weights, and prunes each when it is asked to.

    Args:
        sparsifier: the method.
        plans: FQN -> plan of every weight that is to be pruned.
        weights: FQN -> tensor of each, not masked.
        biases: see the attribute.
        store: holds what has been done, and writes what is.

    Attributes:
        biases: FQN -> the bias that makes up for the mean error of the weight; None for none.
        shares: FQN -> the one right before it, which has the same inputs.
        pruned: what has been done.
        peak: the most bytes that statistics took at a time.
    """

    def __init__(
        self,
        sparsifier: CalibratedSparsifier,
        plans: Mapping[str, Plan],
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor] | None,
        store: Store,
    ) -> None:
        self.sparsifier, self.plans, self.pruned = sparsifier, plans, list[PrunedWeight]()
        self.weights = weights
        self._gradients: Mapping[str, Gradients] = {}
        self.biases, self._store = biases, store
        self.shares: Mapping[str, str] = {}
        self._refused: dict[str, str] = {}
        self._notes: dict[str, dict[str, None]] = {}
        self._last = _Seen()
        self._seen: dict[str, _Seen] = {}
        self._needs = frozenset(sparsifier.needs)
        self._held = self.peak = 0

    def hold(self, gradients: Mapping[str, Gradients]) -> None:
        """Take the gradients of all weights, for methods that need them."""
        self._gradients = gradients
        self._held = sum(g.total.nbytes + g.squares.nbytes for g in gradients.values())
        self.peak = max(self.peak, self._held)

    def looking(
        self, sparsifier: CalibratedSparsifier, plans: Mapping[str, Plan], store: Store
    ) -> "Pruner":
        """One that has the same gradients, and writes elsewhere."""
        weights = {fqn: self.weights[fqn] for fqn in plans}
        other = Pruner(sparsifier, plans, weights, None, store)
        other.hold(self._gradients)
        return other

    def columns(self, fqn: str) -> Tensor:
        """See `MatrixForm.columns`."""
        return self.plans[fqn].form.columns(self.weights[fqn].device)

    def take(self, fqn: str, inputs: WeightInputs, held_out: bool) -> None:
        """Take in inputs of a weight, unless it shares the statistics of the one before."""
        if fqn not in self.shares:
            self._collector(fqn, held_out).add(inputs)

    def note(self, fqn: str, text: str) -> None:
        """Have the report say something of a weight, once; nothing for an empty text."""
        if text:
            self._notes.setdefault(fqn, {})[text] = None

    def refuse(self, fqn: str, reason: str) -> None:
        """Leave a weight dense: its inputs cannot be known."""
        self._refused[fqn] = reason

    @torch.no_grad()
    def prune(self, fqn: str) -> str | None:
        """Solve one weight and write it, or leave everything as it was.

        Returns:
            The reason why the weight stays dense; None where it is pruned.

        Raises:
            CalibrationError: the statistics are not finite, or the solution is none.
        """
        start = time.perf_counter()
        plan, weight = self.plans[fqn], self.weights[fqn]
        stats, unused = self._statistics(fqn)
        if fqn in self._refused:
            return self._refused[fqn]
        if self._needs - {"gradient", "gradient_norm"} and not bool(stats.tokens.any()):
            return "no input of it was seen"
        self._add_gradients(plan, stats)
        _check(fqn, stats)
        # May share the weight's memory: not to be read any more once that is written.
        dense = plan.form.to_matrix(weight.detach()).float().contiguous()
        found = self._solve(plan, dense, stats)
        notes = [*plan.notes, *self._notes.get(fqn, ()), *_data_notes(plan, stats), *found.notes]
        kept, judged = found.weight, None
        if unused is not None:
            kept, judged, note = _judged(dense, found, unused)
            notes += [note] if note else []
        relative = None if stats.gram is None else relative_error(dense, kept, stats)
        bias = self._correction(fqn, dense, kept, stats, notes)
        row = PrunedWeight(
            fqn=fqn,
            pattern=str(plan.config.pattern),
            level=plan.config.level,
            tokens=int(stats.tokens.sum()),
            error=relative,
            seconds=time.perf_counter() - start,
            notes=tuple(notes),
            groups=len(stats.tokens),
            fewest=int(stats.tokens.min()),
            few=_few(plan, stats),
            columns=plan.form.width,
            held_out=judged,
        )
        value = plan.form.from_matrix(kept).to(weight.dtype)
        mask = plan.form.from_matrix(found.mask)
        self._store.write(row, Solved(fqn, mask, value, found.scales), bias)
        self.pruned.append(row)
        return None

    def _solve(self, plan: Plan, dense: Tensor, stats: Statistics) -> Solution:
        """What the method finds, zeros and all, if it is a solution."""
        try:
            found = self.sparsifier.solve(dense.clone(), stats, plan.form.tiling, plan.config.level)
        except ValueError as error:
            error.add_note(f"while pruning {plan.fqn}")
            raise
        return found._replace(weight=_kept(plan.fqn, dense, found))

    def _statistics(self, fqn: str) -> tuple[Statistics, Statistics | None]:
        """What was collected, and of held-out batches; held on to where the next one shares it."""
        if fqn not in self.shares:
            self._collector(fqn, held_out=False)
            self._last = self._seen.pop(fqn)
        used, held_out = self._last.used, self._last.held_out
        assert used is not None
        found = used.statistics, None if held_out is None else held_out.statistics
        if fqn not in self.shares.values():
            self._last = _Seen()
        return found

    def _collector(self, fqn: str, held_out: bool) -> Collector:
        seen = self._seen.setdefault(fqn, _Seen())
        found = seen.held_out if held_out else seen.used
        if found is None:
            needs: set[Statistic] = {"gram"} if held_out else {*self._needs}
            if self.biases is not None and not held_out:
                needs.add("input_mean")
            plan = self.plans[fqn]
            found = Collector(plan.form, needs, self.weights[fqn].device, plan.table)
            if held_out:
                seen.held_out = found
            else:
                seen.used = found
            self.peak = max(self.peak, self._held + sum(s.nbytes for s in self._seen.values()))
        return found

    def _add_gradients(self, plan: Plan, stats: Statistics) -> None:
        found = self._gradients.get(plan.fqn)
        if found is None:
            return
        if "gradient" in self._needs:
            stats.gradients = plan.form.to_matrix(found.total)
        if "gradient_norm" in self._needs:
            stats.gradient_squares = plan.form.to_matrix(found.squares)

    def _correction(
        self, fqn: str, dense: Tensor, kept: Tensor, stats: Statistics, notes: list[str]
    ) -> tuple[Tensor, Tensor] | None:
        """A bias, and what it has to become."""
        if self.biases is None:
            return None
        if fqn not in self.biases:
            notes.append("no bias of its own to correct")
            return None
        assert stats.sums is not None
        mean = stats.sums / stats.tokens.clamp(min=1).unsqueeze(1)
        bias = self.biases[fqn]
        missing = ((dense - kept) @ mean.unsqueeze(-1)).reshape(bias.shape)
        return bias, (bias.float() + missing).to(bias.dtype)


@dataclass
class _Seen:
    """Sums over the inputs of one weight.

    Attributes:
        used: of those that it is solved with.
        held_out: of those that it is judged by.
    """

    used: Collector | None = None
    held_out: Collector | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        return sum(found.nbytes for found in (self.used, self.held_out) if found is not None)


def _judged(dense: Tensor, found: Solution, unused: Statistics) -> tuple[Tensor, float | None, str]:
    """The weight, damped where its update overfits; its error on held-out inputs; and a note."""
    if not bool(unused.tokens.any()):
        return found.weight, None, "no held-out input of it was seen"
    kept, share = damped(dense, found.mask, found.weight, unused)
    whole = relative_error(dense, found.weight, unused)
    if kept is found.weight:
        return kept, whole, ""
    least, many = float(share.min()), int((share < 1).sum())
    of = f" in {many} of {len(share)} groups" if len(share) > 1 else ""
    note = f"its update overfits{of}: {whole:.3g} of error held out"
    if found.scales is not None:
        return found.weight, whole, f"{note}; not damped, for it is rounded"
    return kept, relative_error(dense, kept, unused), f"{note}, damped to {least:.2f} of it"


def _all_finite(tensor: Tensor) -> bool:
    """A sum is not finite where a term is not; the converse may fail, if it overflows."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _check(fqn: str, stats: Statistics) -> None:
    sums = (stats.squares, stats.sums, stats.gram, stats.gradients, stats.gradient_squares)
    for found in sums:
        if found is not None and not _all_finite(found):
            raise CalibrationError(
                f"{fqn}: the calibration data bring NaN or infinite values to its inputs; "
                "look for the batch, or for a layer before it that overflows"
            )


def _kept(fqn: str, dense: Tensor, solution: Solution) -> Tensor:
    """The weight of a solution, zeros and all, if it is one."""
    for what, found, dtype in (
        ("mask", solution.mask, torch.bool),
        ("weight", solution.weight, torch.float32),
    ):
        if found.shape != dense.shape or found.dtype != dtype:
            raise CalibrationError(
                f"{fqn}: expected a {what} of shape {tuple(dense.shape)} and {dtype} from the "
                f"method, found {tuple(found.shape)} and {found.dtype}"
            )
    kept = select(solution.mask, solution.weight)
    if not _all_finite(kept):
        raise CalibrationError(f"{fqn}: the method made NaN or infinite values of kept weights")
    return kept


def _data_notes(plan: Plan, stats: Statistics) -> list[str]:
    """What to know of the data that a weight saw."""
    fewest, size = int(stats.tokens.min()), plan.form.width
    if stats.gram is not None and fewest < size and not _few(plan, stats):
        return [f"{fewest} inputs for {size} columns: the Gram matrix is singular"]
    if plan.table and stats.squares is not None and (unseen := int((stats.squares == 0).sum())):
        return [f"{unseen} of {size} rows were never looked up: they go first"]
    return []


def _few(plan: Plan, stats: Statistics) -> int:
    """See `PrunedWeight.few`."""
    routed = bool((stats.tokens != stats.tokens[0]).any()) or _EXPERT.search(plan.fqn) is not None
    return int((stats.tokens < plan.form.width).sum()) if routed and not plan.table else 0
