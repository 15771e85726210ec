"""The verb `prune`: from calibration batches to masks and updated weights, in one call."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fx_sparsity.graph.discovery import find_weights, read_graph
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.frontends import CaptureError
from fx_sparsity.graph.mapping import MappingLike, SparsityMapping
from fx_sparsity.graph.named_tensors import named_tensors
from fx_sparsity.graph.prepare import group_entry
from fx_sparsity.graph.uses import canonical_fqn
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.masks import contains_nan
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.pruning.allocate import Measuring, allocate, measure
from fx_sparsity.pruning.allocation import Allocation, MeasuredAllocation
from fx_sparsity.pruning.batches import Batch, Captured, capture, check_forms, read_batches
from fx_sparsity.pruning.bias import estimate_batch_norms, find_biases, fits
from fx_sparsity.pruning.gradients import Loss, collect_gradients
from fx_sparsity.pruning.methods import CalibratedSparsifier, Statistic
from fx_sparsity.pruning.observe import groups_of_module, observe
from fx_sparsity.pruning.plan import (
    Plan,
    Unreachable,
    groups_in,
    make_plan,
    only_scales,
    shared_inputs,
)
from fx_sparsity.pruning.progress import progress as show_progress
from fx_sparsity.pruning.pruner import CalibrationError, Pruner
from fx_sparsity.pruning.report import PruningReport
from fx_sparsity.pruning.store import MaskStore, Store
from fx_sparsity.pruning.walk import GraphUse, Walk, canonical_names, find_uses
from fx_sparsity.sparsifier import Mask
from fx_sparsity.sparsifier.target import MaskError, check_maskable, check_memory, mask_on

_log = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)
GRADIENTS: frozenset[Statistic] = frozenset({"gradient", "gradient_norm"})


def prune(
    model: _Model,
    sparsifier: CalibratedSparsifier,
    batches: Iterable[ExampleInputs],
    mapping: MappingLike | None = None,
    *,
    sequential: bool = True,
    dynamic_shapes: Any = None,
    loss: Loss | None = None,
    allocation: Allocation | None = None,
    correct_bias: bool = False,
    progress: bool | None = None,
) -> tuple[_Model, PruningReport]:
    """Prune a model in one shot, each weight by its real inputs.

    The batches walk through the model's graph. Where all inputs of a weight are known, the
    sparsifier chooses its mask and the values of what it keeps, both are written, and the batches
    go on with what the pruned layer gives out. A weight that is used several times sums over its
    uses and is pruned at the last. In memory are the activations that are needed later and the
    statistics of one weight (of a tied one, from its first use to its last).

    Where no graph can be captured, the operators of the running model are observed instead, all
    weights at once, and the report says so.

    One weight is the unit of change: after an interruption or an error the weights that are done
    stay pruned and the others are untouched; calling again with the same sparsifier, or one that
    loaded its `state_dict`, goes on with the others. Whatever is raised before the first weight is
    done, nothing was changed.

    Args:
        model: changed in place: masks as by `prepare`, beneath them the updated weights. Runs in
            eval mode; mode, buffers and random state are as before afterwards.
        sparsifier: chooses masks and values; a fresh one, or one that is bound to this model.
        batches: each a tuple of positional, or a dict of keyword arguments, or one tensor, on the
            model's device. All are held at once. Sizes may differ: they become dynamic, or take
            a graph each.
        mapping: which weight gets which pattern and level. None gives every weight the
            sparsifier's defaults.
        sequential: False takes all statistics from the dense model, in one pass, and holds them
            at once.
        dynamic_shapes: as `torch.export.export` takes it, in place of sizes that differ.
        loss: (what the model returns, the batch) -> scalar; for methods that need gradients, which
            are those of the dense model.
        allocation: spreads what the mapping's levels come to in all over the weights, and meets it
            to the element; None prunes each weight to its own level. Rules that measure take one
            more pass over the dense model before anything is changed.
        correct_bias: add to the bias of each layer the mean of what pruning took from its
            outputs, and measure batch norms anew at the end.
        progress: a bar, see `fx_sparsity.pruning.progress`.

    Returns:
        `model`, and what was done to each weight.

    Raises:
        InputError: there is no batch, one lies on another device, or the model rejects it.
        MappingError: an unknown name, or a weight that cannot take its pattern.
        PatternError: a pattern without a matrix form for a weight.
        MaskError: a weight that cannot be masked, or that holds NaN or no data.
        CalibrationError: NaN or infinite inputs of a weight, or shapes whose graphs use the
            weights in different orders.
        ValueError: the method or the allocation needs gradients and there is no loss, or a pattern
            such as 2:4 fixes the level that an allocation would choose.
    """
    store = MaskStore(model, sparsifier)
    options = PruneOptions(sequential, dynamic_shapes, loss, allocation, correct_bias, progress)
    return model, calibrate(model, sparsifier, batches, mapping, store, options)


class PruneOptions(NamedTuple):
    """What `prune` takes beside model, method and data; see there."""

    sequential: bool
    dynamic_shapes: Any
    loss: Loss | None
    allocation: Allocation | None
    correct_bias: bool
    progress: bool | None


def calibrate(
    model: nn.Module,
    sparsifier: CalibratedSparsifier,
    batches: Iterable[ExampleInputs],
    mapping: MappingLike | None,
    store: Store,
    options: PruneOptions,
) -> PruningReport:
    """What `prune` does, wherever the pruned weights go.

    Args:
        model: as `prune` takes it; changed by `store` alone.
        sparsifier: chooses masks and values.
        batches: as `prune` takes them.
        mapping: as `prune` takes it.
        store: takes the pruned weights.
        options: as `prune` takes them.

    Raises:
        What `prune` does.
    """
    start = time.perf_counter()
    mapping = None if mapping is None else SparsityMapping.of(mapping)
    sequential, dynamic_shapes, loss, allocation, correct_bias, progress = options
    if not isinstance(sparsifier, CalibratedSparsifier):
        raise TypeError(
            f"sparsifier: expected a CalibratedSparsifier, found {type(sparsifier).__name__}, "
            "which needs no data; call prepare and step"
        )
    measuring = None
    if isinstance(allocation, MeasuredAllocation):
        measuring = Measuring(allocation, sparsifier)
    gradients = GRADIENTS & (sparsifier.needs | (measuring.needs if measuring else frozenset()))
    if gradients and loss is None:
        needy = sparsifier if sparsifier.needs & GRADIENTS else allocation
        raise ValueError(
            f"{type(needy).__name__} needs gradients: "
            "pass loss=, a function of what the model returns and the batch"
        )
    read = read_batches(model, batches)
    with _evaluating(model):
        with _buffers_kept(model):
            check_forms(model, read)
            frame = _capture(model, read, dynamic_shapes)
            todo = _decide(model, sparsifier, frame, mapping, store)
            tensors = {canonical_fqn(name): tensor for name, tensor in named_tensors(model)}
            weights = {fqn: tensors[fqn] for fqn in todo.plans}
            _check_weights(model, weights)
            biases = _biases(frame, todo) if correct_bias else None
            pruner = Pruner(sparsifier, todo.plans, weights, biases, store)
            walks = _walks(frame, pruner, store, todo.plans, sequential)
            store.begin(frame.weights, todo.plans, weights)
            if loss is not None and gradients:
                pruner.hold(collect_gradients(model, read, loss, weights))
            if allocation is not None:
                levels = _allocate(
                    allocation, measuring, sparsifier, pruner, frame, todo, store, weights, read
                )
                todo.plans.update(levels)
            complete = _complete(frame, walks, pruner, weights, read, sequential)
            try:
                with torch.no_grad(), show_progress(len(todo.plans), progress) as advance:
                    for fqn in complete:
                        reason = pruner.prune(fqn)
                        if reason is not None:
                            todo.dense[fqn] = reason
                            _log.warning("%s stays dense: %s", fqn, reason)
                        advance(fqn)
            except BaseException as error:
                _tell(error, pruner, len(todo.plans), store)
                raise
        if correct_bias:
            estimate_batch_norms(model, read)
    walked = bool(frame.captured)
    return PruningReport(
        rows=tuple(pruner.pruned),
        dense=todo.dense,
        sequential=walked and sequential,
        reason=frame.reason if sequential or not walked else "asked for",
        batches=len(read),
        statistics_bytes=pruner.peak,
        activation_bytes=sum(walk.peak for walk in walks),
        seconds=time.perf_counter() - start,
    )


class _Frame(NamedTuple):
    """A model as it was captured.

    Attributes:
        model: that was captured.
        weights: of the model.
        captured: graphs; none where no graph can be captured.
        uses: of the weights, graph by graph.
        reason: how the statistics come about.
    """

    model: nn.Module
    weights: WeightMap
    captured: Sequence[Captured]
    uses: Sequence[Sequence[GraphUse]]
    reason: str


class _Todo(NamedTuple):
    """What is pruned, and what is not.

    Attributes:
        plans: FQN -> how.
        dense: FQN -> the reason why not.
        done: FQN -> how it was pruned, of those that were before.
    """

    plans: dict[str, Plan]
    dense: dict[str, str]
    done: dict[str, Plan]


def _capture(model: nn.Module, batches: Sequence[Batch], dynamic_shapes: Any) -> _Frame:
    try:
        captured = capture(model, batches, dynamic_shapes)
    except CaptureError as error:
        _log.warning("statistics of all weights are taken at once: %s", error)
        weights = find_weights(model, batches[0].inputs)
        cause = type(error.__cause__ or error).__name__
        return _Frame(model, weights, (), (), f"no graph ({cause}), the running model was observed")
    weights = read_graph(model, captured[0].graph)
    uses = [find_uses(found.graph, weights) for found in captured]
    count = len(captured)
    return _Frame(model, weights, captured, uses, f"{count} graph{'' if count == 1 else 's'}")


def _decide(
    model: nn.Module,
    sparsifier: CalibratedSparsifier,
    frame: _Frame,
    mapping: SparsityMapping | None,
    store: Store,
) -> _Todo:
    dense = {parameter.fqn: parameter.text for parameter in frame.weights.dense}
    configs: Mapping[str, SparsityConfig | None] = dict.fromkeys(frame.weights)
    if mapping is not None:
        configs = assignment = mapping.resolve(frame.weights)
        dense |= assignment.dense
        for entry in assignment.unmatched:
            _log.warning("no weight matches %s of the mapping", entry)
    plans: dict[str, Plan] = {}
    done: dict[str, Plan] = {}
    for fqn, config in configs.items():
        site = frame.weights[fqn]
        uses = [use for use in frame.uses[0] if use.fqn == fqn] if frame.uses else []
        try:
            if uses and only_scales(uses) and not (mapping and mapping.names(site)):
                raise Unreachable("only a factor of constants; name it in the mapping to prune it")
            if any(use.node.graph is not frame.captured[0].graph.graph for use in uses):
                raise Unreachable("used in a subgraph, whose inputs are not seen")
            groups = groups_in(uses) if frame.uses else groups_of_module(model, site)
            plan = make_plan(site, _config(sparsifier, fqn, config), groups)
            if store.is_done(plan):
                done[fqn] = plan
                raise Unreachable("pruned already by this sparsifier")
            plans[fqn] = plan
        except Unreachable as error:
            dense[fqn] = str(error)
    for fqn, reason in dense.items():
        _log.info("%s stays dense: %s", fqn, reason)
    return _Todo(plans, dense, done)


def _biases(frame: _Frame, todo: _Todo) -> dict[str, Tensor]:
    """As the graph shows them; those of a running model are only known when it has run."""
    if not frame.captured:
        return {}
    return find_biases(frame.captured[0].graph, frame.uses[0], todo.plans)


def _config(
    sparsifier: CalibratedSparsifier, fqn: str, config: SparsityConfig | None
) -> SparsityConfig:
    """Pattern and level as the sparsifier reads them."""
    entry = {} if config is None else group_entry(config)
    found = sparsifier.pattern_of({**sparsifier.defaults, **entry})
    if found is None:
        raise MaskError(
            f"{fqn}: {type(sparsifier).__name__} has no default pattern; pass a mapping"
        )
    pattern, level = found
    return SparsityConfig(pattern, level if pattern.implied_level is None else None)


def _check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise `MaskError` for weights that could not be masked, or not be ranked."""
    for fqn, weight in weights.items():
        path, _, attribute = fqn.rpartition(".")
        owner = model.get_submodule(path)
        if mask_on(owner, attribute) is None:
            check_maskable(fqn, owner, attribute)
        if weight.is_meta:
            raise MaskError(f"{fqn} has no data, it is on the meta device; load the model first")
    check_memory(model, {id(weight): fqn for fqn, weight in weights.items()})
    if weights and contains_nan(*weights.values()):
        bad = next(fqn for fqn, weight in weights.items() if contains_nan(weight))
        raise MaskError(f"{bad} contains NaN; it cannot be ranked")


def _walks(
    frame: _Frame, pruner: Pruner, store: Store, plans: Mapping[str, Plan], sequential: bool
) -> list[Walk]:
    """A walk through every graph; none where there is no graph, or nothing to prune."""
    if not plans or not frame.captured:
        return []
    named = canonical_names(frame.weights)
    walks: list[Walk] = []
    shared: list[dict[str, str]] = []
    for captured, uses in zip(frame.captured, frame.uses, strict=True):
        counted = [u for u in uses if u.fqn in plans and plans[u.fqn].counts(u.use)]
        arguments = (named, pruner.columns, store.read, pruner.take, pruner.refuse)
        walks.append(Walk(captured.graph, captured.batches, counted, *arguments))
        shared.append(shared_inputs(walks[-1].order, counted, plans))
    _check_orders(walks, frame.captured)
    if sequential:
        pruner.shares = dict(set.intersection(*(set(found.items()) for found in shared)))
    return walks


def _complete(
    frame: _Frame,
    walks: Sequence[Walk],
    pruner: Pruner,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    sequential: bool,
) -> Iterator[str]:
    """FQN after FQN, each when all inputs of the weight have been taken in."""
    if not frame.captured:
        return _observe(frame.model, pruner, weights, batches)
    steps = (fqns[0] for fqns in zip(*walks, strict=True))
    return steps if sequential else _at_once(steps)


def _at_once(steps: Iterator[str]) -> Iterator[str]:
    yield from list(steps)


def _observe(
    model: nn.Module, pruner: Pruner, weights: Mapping[str, Tensor], batches: Sequence[Batch]
) -> Iterator[str]:
    """FQN after FQN, when all inputs of all weights of the running model have been taken in."""
    plans = pruner.plans
    tables = {fqn for fqn, plan in plans.items() if plan.table}
    found = observe(model, batches, weights, tables, pruner.columns, pruner.take, pruner.refuse)
    if pruner.biases is not None:
        pruner.biases = {fqn: bias for fqn, bias in found.items() if fits(bias, plans[fqn])}
    yield from plans


def _allocate(
    rule: Allocation,
    measuring: Measuring | None,
    sparsifier: CalibratedSparsifier,
    pruner: Pruner,
    frame: _Frame,
    todo: _Todo,
    store: Store,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
) -> dict[str, Plan]:
    """Plans with the levels of a rule; those of weights that cannot be pruned are left out."""
    plans = todo.plans
    measured: dict[str, Any] = {}
    if measuring is not None and plans:
        looking = pruner.looking(measuring)
        walks = _walks(frame, looking, store, plans, sequential=True)
        steps = _complete(frame, walks, looking, weights, batches, sequential=True)
        with torch.no_grad():
            measured = measure(measuring, looking, steps)
        plans = {fqn: plan for fqn, plan in plans.items() if fqn in measured}
    done = {
        fqn: (plan, int((sparsifier.get_mask(fqn) == 0).sum())) for fqn, plan in todo.done.items()
    }
    return allocate(rule, plans, done, frame.weights, measured)


def _check_orders(walks: Sequence[Walk], captured: Sequence[Captured]) -> None:
    first = walks[0].order
    for walk, found in zip(walks, captured, strict=True):
        if walk.order != first:
            differ = sorted({*first} ^ {*walk.order}) or [
                a for a, b in zip(first, walk.order, strict=True) if a != b
            ]
            raise CalibrationError(
                f"batches {captured[0].batches[0].number} and {found.batches[0].number} take "
                f"graphs that use the weights in another order, from {differ[0]} on; "
                "calibrate with batches of one shape"
            )


def _tell(error: BaseException, pruner: Pruner, total: int, store: Store) -> None:
    """Add to an error what has been done so far."""
    done = len(pruner.pruned)
    if done:
        note = (
            f"{done} of {total} weights are pruned, the last of them {pruner.pruned[-1].fqn}; "
            f"the others are untouched. {store.how_to_resume}"
        )
        error.add_note(note)
        _log.warning("%s", note)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and a random state of its own, with operators that show their weights."""
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that the model writes when it runs are put back; masks are not among them."""
    masks = {id(b) for m in model.modules() if isinstance(m, Mask) for b in m.buffers()}
    before = [(b, b.clone()) for b in model.buffers() if id(b) not in masks]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
