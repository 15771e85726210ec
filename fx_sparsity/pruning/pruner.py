"""One weight is the unit of change: its statistics, its solution, and the writing of it."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.passes import InsertMasks
from fx_sparsity.graph.prepare import mask_one_by_one
from fx_sparsity.graph.weight_inputs import WeightInputs
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.pruning.batches import is_exported
from fx_sparsity.pruning.collect import Collector
from fx_sparsity.pruning.gradients import Gradients
from fx_sparsity.pruning.methods import CalibratedSparsifier, Solution, Statistic, Statistics
from fx_sparsity.pruning.methods.statistics import relative_error
from fx_sparsity.pruning.methods.where import select
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.report import PrunedWeight
from fx_sparsity.sparsifier import Mask, MaskError
from fx_sparsity.sparsifier.target import graph_mask

_EXPERT = re.compile(r"(?:^|[._])experts?[._]")
DONE = "calibrated"
"""Counter in a sparsifier's state of a weight that has been pruned."""


class CalibrationError(FxSparsityError, ValueError):
    """Calibration data, or what a method makes of it, cannot be used; the weight is named."""


class Store(Protocol):
    """Holds what has been done, and writes what is.

    Attributes:
        how_to_resume: after an interruption, for whoever reads of it.
    """

    how_to_resume: str

    def is_done(self, plan: Plan) -> bool:
        """Whether a weight has been pruned before."""

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """Called when everything is checked, and before anything is changed.

        Args:
            weights: of the model.
            plans: FQN -> plan of every weight that is to be pruned.
            tensors: FQN -> the model's tensor of each, not masked.

        Raises:
            MaskError: what has been done was done to another model.
        """

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as the walk is to see it."""

    def write(
        self, row: PrunedWeight, keep: Tensor, value: Tensor, bias: tuple[Tensor, Tensor] | None
    ) -> None:
        """Write mask, weight and bias; after an interruption, none of them.

        Args:
            row: tells of the weight.
            keep: its mask: boolean, of its shape.
            value: its kept values and zeros, of its shape and dtype.
            bias: a bias, and what it has to become.
        """


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
        self._last: Collector | None = None
        self._collectors: dict[str, Collector] = {}
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

    def take(self, fqn: str, inputs: WeightInputs) -> None:
        """Take in inputs of a weight, unless it shares the statistics of the one before."""
        if fqn not in self.shares:
            self._collector(fqn).add(inputs)

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
        plan, weight, stats = self.plans[fqn], self.weights[fqn], self._statistics(fqn)
        if fqn in self._refused:
            return self._refused[fqn]
        if self._needs - {"gradient", "gradient_norm"} and not bool(stats.tokens.any()):
            return "no input of it was seen"
        self._add_gradients(plan, stats)
        _check(fqn, stats)
        # May share the weight's memory: not to be read any more once that is written.
        dense = plan.form.to_matrix(weight.detach()).float().contiguous()
        mask, kept, solved = self._solve(plan, dense, stats)
        notes = [*plan.notes, *self._notes.get(fqn, ()), *_data_notes(plan, stats), *solved]
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
        )
        value = plan.form.from_matrix(kept).to(weight.dtype)
        self._store.write(row, plan.form.from_matrix(mask), value, bias)
        self.pruned.append(row)
        return None

    def _solve(
        self, plan: Plan, dense: Tensor, stats: Statistics
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Mask, kept values and zeros, and notes, if they are a solution."""
        try:
            found = self.sparsifier.solve(dense.clone(), stats, plan.form.tiling, plan.config.level)
        except ValueError as error:
            error.add_note(f"while pruning {plan.fqn}")
            raise
        return found.mask, _kept(plan.fqn, dense, found), found.notes

    def _statistics(self, fqn: str) -> Statistics:
        """What was collected; held on to where the next weight shares it."""
        if fqn not in self.shares:
            self._last = self._collector(fqn)
            del self._collectors[fqn]
        assert self._last is not None
        found = self._last.statistics
        if fqn not in self.shares.values():
            self._last = None
        return found

    def _collector(self, fqn: str) -> Collector:
        if fqn not in self._collectors:
            needs: set[Statistic] = {*self._needs}
            if self.biases is not None:
                needs.add("input_mean")
            plan = self.plans[fqn]
            device = self.weights[fqn].device
            self._collectors[fqn] = Collector(plan.form, needs, device, plan.table)
            bytes_now = sum(collector.nbytes for collector in self._collectors.values())
            self.peak = max(self.peak, self._held + bytes_now)
        return self._collectors[fqn]

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
    return []


def _few(plan: Plan, stats: Statistics) -> int:
    """See `PrunedWeight.few`."""
    routed = bool((stats.tokens != stats.tokens[0]).any()) or _EXPERT.search(plan.fqn) is not None
    return int((stats.tokens < plan.form.width).sum()) if routed and not plan.table else 0


class Untouched:
    """Reads as another store does, and writes nothing.

    Args:
        store: to read from.
    """

    how_to_resume = "Nothing was changed."

    def __init__(self, store: Store) -> None:
        self._store = store

    def is_done(self, plan: Plan) -> bool:
        """See `Store.is_done`."""
        return self._store.is_done(plan)

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """See `Store.begin`."""

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`."""
        return self._store.read(fqn, tensor)

    def write(
        self, row: PrunedWeight, keep: Tensor, value: Tensor, bias: tuple[Tensor, Tensor] | None
    ) -> None:
        """See `Store.write`."""


class MaskStore:
    """Puts masks on a model, and writes kept values beneath them.

    Args:
        model: whose weights are pruned.
        sparsifier: holds the masks.
    """

    how_to_resume = "Call prune again with the same sparsifier to go on."

    def __init__(self, model: nn.Module, sparsifier: CalibratedSparsifier) -> None:
        self._model, self._sparsifier = model, sparsifier
        self._weights: WeightMap
        self._plans: Mapping[str, Plan] = {}
        self._tensors: Mapping[str, Tensor] = {}
        self._put_mask: Callable[[str], object] | None = None
        self._written: dict[str, Tensor] = {}

    def is_done(self, plan: Plan) -> bool:
        """See `Store.is_done`."""
        return plan.fqn in self._sparsifier.names and DONE in self._sparsifier.state[plan.fqn]

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """See `Store.begin`."""
        self._weights, self._plans, self._tensors = weights, plans, tensors
        bound = self._sparsifier.model
        if bound is not None and bound is not self._model and self._sparsifier.names:
            raise MaskError(
                f"the sparsifier is bound to another {type(bound).__name__}; "
                "prune this model with a fresh one"
            )
        if bound is None and self._sparsifier.names:
            if is_exported(self._model):
                self._select_in_graph(self._model)
            self._sparsifier.attach(self._model)

    def _select_in_graph(self, model: fx.GraphModule) -> None:
        """Put masks of ones where the sparsifier's own are to go; elsewhere `attach` does."""
        masks: dict[str, Mask] = {}
        for fqn in self._sparsifier.names:
            if fqn in self._weights and graph_mask(model, fqn) is None:
                ones = torch.ones(self._weights[fqn].shape, dtype=torch.bool)
                mask = Mask(ones.to(model.get_parameter(fqn).device))
                masks |= dict.fromkeys(self._weights[fqn].names, mask)
        InsertMasks(masks)(model)

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`: through its mask, where it has one."""
        if fqn in self._written:
            return self._written.pop(fqn)  # bit for bit what the mask makes of it
        if fqn in self._sparsifier.names:
            return self._sparsifier.get_data(fqn, return_original=False)
        return tensor

    def write(
        self, row: PrunedWeight, keep: Tensor, value: Tensor, bias: tuple[Tensor, Tensor] | None
    ) -> None:
        """See `Store.write`."""
        self.write_all([Solved(row.fqn, keep, value)], [] if bias is None else [bias])

    def write_all(
        self, solved: Sequence["Solved"], others: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Write several weights at once; after an interruption, none of them.

        Args:
            solved: the weights.
            others: tensors of the model, and what they have to become.
        """
        if self._put_mask is None:
            configs = {name: plan.config for name, plan in self._plans.items()}
            self._put_mask = mask_one_by_one(self._model, self._sparsifier, self._weights, configs)
        written = list(others)
        for fqn, keep, value in solved:
            self._put_mask(fqn)
            weight, mask = self._tensors[fqn], self._sparsifier.get_mask(fqn)
            written += [(weight, select(keep, value, weight)), (mask, keep.to(mask.dtype))]
        before = [tensor.clone() for tensor, _ in written]
        states = [self._sparsifier.state[fqn] for fqn, _, _ in solved]
        try:
            for tensor, new in written:
                tensor.copy_(new)
            for state in states:
                state[DONE] = True
        except BaseException:
            for (tensor, _), old in zip(written, before, strict=True):
                tensor.copy_(old)
            for state in states:
                state.pop(DONE, None)
            raise
        self._written = {
            fqn: value for fqn, _, value in solved if value.stride() == self._tensors[fqn].stride()
        }


class Solved(NamedTuple):
    """What a weight is to become.

    Attributes:
        fqn: of the weight.
        keep: its mask: boolean, of its shape.
        value: its kept values and zeros, of its shape and dtype.
    """

    fqn: str
    keep: Tensor
    value: Tensor


class HeldStore:
    """A store that can hold back what it is to write, for all of it to be written at once.

    Args:
        store: to write to, and to read from.

    Attributes:
        held: FQN -> what the weight is to become, and is read as.
    """

    def __init__(self, store: MaskStore) -> None:
        self._store, self._holds = store, False
        self.how_to_resume = store.how_to_resume
        self.held: dict[str, Solved] = {}
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}

    def is_done(self, plan: Plan) -> bool:
        """See `Store.is_done`."""
        return self._store.is_done(plan)

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """See `Store.begin`."""
        self._store.begin(weights, plans, tensors)

    def hold(self) -> None:
        """From now on write nothing, until `write_held`."""
        self._holds = True

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`: as what it is to become."""
        if fqn in self.held:
            return self.held[fqn].value
        if id(tensor) in self._biases:
            return self._biases[id(tensor)][1]
        return self._store.read(fqn, tensor)

    def write(
        self, row: PrunedWeight, keep: Tensor, value: Tensor, bias: tuple[Tensor, Tensor] | None
    ) -> None:
        """See `Store.write`."""
        if not self._holds:
            self._store.write(row, keep, value, bias)
            return
        self.held[row.fqn] = Solved(row.fqn, keep, value)
        if bias is not None:
            self._biases[id(bias[0])] = bias

    def write_held(self, values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        """Write what was held back, with other values.

        Args:
            values: name -> what the tensor is to become, of weights that are held and of others.
            others: name -> the model's tensor, of the others.
        """
        solved = [one._replace(value=values.get(fqn, one.value)) for fqn, one in self.held.items()]
        named = {id(others[n]): (others[n], v) for n, v in values.items() if n not in self.held}
        self._store.write_all(solved, list((self._biases | named).values()))
        self.drop()

    def drop(self) -> None:
        """Forget what was held back, and hold back no more."""
        self.held.clear()
        self._biases.clear()
        self._holds = False
