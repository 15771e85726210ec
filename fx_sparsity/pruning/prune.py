"""The verb `prune`: from calibration batches to masks and updated weights, in one call."""

import logging
import os
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.mapping import MappingLike, SparsityMapping
from fx_sparsity.progress import progress as show_progress
from fx_sparsity.pruning import programs
from fx_sparsity.pruning.allocate import allocate, needs_of
from fx_sparsity.pruning.allocation import Allocation
from fx_sparsity.pruning.batches import capture, check_forms, read_batches
from fx_sparsity.pruning.bias import estimate_batch_norms, find_biases
from fx_sparsity.pruning.calibration import Calibration
from fx_sparsity.pruning.gradients import Loss, collect_gradients
from fx_sparsity.pruning.held_out import hold_out
from fx_sparsity.pruning.methods import CalibratedSparsifier, Statistic
from fx_sparsity.pruning.methods.calibrated import Sequential
from fx_sparsity.pruning.offload import offload_to
from fx_sparsity.pruning.plan import decide
from fx_sparsity.pruning.pruner import Pruner
from fx_sparsity.pruning.reconstruction import Rebuilder, Reconstruction
from fx_sparsity.pruning.report import PruningReport
from fx_sparsity.pruning.stores import HeldStore, MaskStore, Store
from fx_sparsity.pruning.undisturbed import buffers_kept, evaluating

_log = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module | ExportedProgram)
GRADIENTS: frozenset[Statistic] = frozenset({"gradient", "gradient_norm"})


def prune(
    model: _Model,
    sparsifier: CalibratedSparsifier,
    batches: Iterable[ExampleInputs],
    mapping: MappingLike | None = None,
    *,
    sequential: Sequential | None = None,
    dynamic_shapes: Any = None,
    loss: Loss | None = None,
    allocation: Allocation | None = None,
    correct_bias: bool = False,
    token_weights: Iterable[Tensor] | None = None,
    all_experts: bool = False,
    held_out: float = 0.0,
    offload: str | os.PathLike[str] | None = None,
    reconstruction: Reconstruction | None = None,
    progress: bool = True,
) -> tuple[_Model, PruningReport]:
    """Prune a model in one shot, each weight by its real inputs.

    The batches walk through the model's graph. Where all inputs of a weight are known, the
    sparsifier chooses its mask and the values of what it keeps, both are written, and the batches
    go on with what the pruned layer gives out. A weight that is used several times sums over its
    uses and is pruned at the last. In memory are the activations that are needed later and the
    statistics of one weight (of a tied one, from its first use to its last).

    Where no graph can be captured, the operators of the running model are observed instead, and the
    report says so: block by block, where a container holds several modules of one class, such as
    the layers of a language model. Each block sees what the pruned ones before it give out, and in
    memory are the statistics of one; for n blocks, the model runs about n / 2 times over all
    batches. Other models are observed once, for all weights.

    One weight is the unit of change: after an interruption or an error the weights that are done
    stay pruned and the others are untouched; calling again with the same sparsifier, or one that
    loaded its `state_dict`, goes on with the others. Whatever is raised before the first weight is
    done, nothing was changed.

    Args:
        model: changed in place: masks as by `prepare`, beneath them the updated weights. Runs in
            eval mode; mode, buffers and random state are as before afterwards.
            Or what `torch.export` gives, as it is, with the mode and the shapes that it has: the
            module of a program is changed in place, too; an `ExportedProgram` is not, nor is the
            model that it came from.
        sparsifier: chooses masks and values; a fresh one, or one that is bound to this model.
        batches: each a tuple of positional, or a dict of keyword arguments, or one tensor, on the
            model's device. Each is read once, and held. Sizes may differ: they become dynamic, or
            take a graph each. A graph that was exported with both kinds of arguments takes a dict.
        mapping: which weight gets which pattern and level. None gives every weight the
            sparsifier's defaults.
        sequential: None leaves it to the method: "blocks" for Wanda, True for all others. True has
            each weight see what the pruned ones before it give out. "blocks" has
            all weights of a block, such as a layer of a language model, see what the pruned blocks
            before it give out, and the block as it was, as the code of Wanda and SparseGPT does;
            in memory are the statistics of one block and, once more, the activations at its
            beginning. A call that goes on in the middle of a block sees what is pruned of it. False
            takes all statistics from the dense model, in one pass, and holds them at once.
        dynamic_shapes: as `torch.export.export` takes it, in place of sizes that differ; not for
            a graph, which has its own.
        loss: (what the model returns, the batch) -> scalar; for methods that need gradients, which
            are those of the dense model.
        allocation: spreads what the mapping's levels come to in all over the weights, and meets it
            to the element; None prunes each weight to its own level. Rules that measure take one
            more pass over the dense model before anything is changed; `LeastError` runs it more
            often, and writes into its weights meanwhile, which it puts back.
        correct_bias: add to the bias of each layer the mean of what pruning took from its
            outputs, and measure batch norms anew at the end.
        token_weights: which tokens count, for each batch zeros and ones of shape [batch, tokens].
            By default the batch says so itself: what its `attention_mask` (and, on the decoder's
            side, its `decoder_attention_mask`) leaves out is padding, and counts for nothing.
        all_experts: statistics of experts are of all tokens, as if the router sent each of them to
            every expert; what they give out is still of those that the router chooses. Where k of
            n experts are chosen and k does not divide n, a token counts several times.
        held_out: share of the batches that no weight is solved with, spread over all of them. The
            report then has each weight's error on these, whatever the method; and where an update
            of kept values overfits, as with few tokens, as much of it is taken back as makes that
            error the least, with a note. Takes the room of one more Gram matrix.
        offload: a folder, on a disk with room for `report.activation_bytes`: batches and
            activations on the CPU are kept in files there, which leave nothing behind, and memory
            does not grow with the data.
        reconstruction: rebuilds each block, such as a layer of a language model, once its weights
            are pruned: what they keep, and norms and biases, are optimized together until the block
            gives out what the dense one did. The block is the unit of change then.
        progress: True shows a bar on a terminal and log lines elsewhere, False nothing.

    Returns:
        `model`, or of an ExportedProgram a pruned copy, and what was done to each weight.

    Raises:
        InputError: there is no batch, `batches` is a single one, one lies on another device, or the
            model or its graph rejects it.
        MappingError: an unknown name, or a weight that cannot take its pattern.
        PatternError: a pattern without a matrix form for a weight.
        MaskError: a weight that cannot be masked, or that holds NaN or no data.
        CalibrationError: NaN or infinite inputs of a weight, shapes whose graphs use the weights
            in different orders, or `all_experts` of a model without a graph that shows a router,
            or `reconstruction` of a model without a graph.
        ValueError: the method or the allocation needs gradients and there is no loss, or a pattern
            such as 2:4 fixes the level that an allocation would choose, or there are
            `dynamic_shapes` of a graph, or an unknown way to be `sequential`, or `reconstruction`
            of what the method rounds.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batches = [(torch.randn(16, 8),) for _ in range(4)]
        >>> model, report = fxs.prune(model, fxs.WandaSparsifier(), batches, "2:4")
        >>> [(row.fqn, row.pattern, row.tokens) for row in report.rows]
        [('0.weight', '2:4', 64), ('2.weight', '2:4', 64)]
    """
    options = PruneOptions(
        sequential=sequential,
        dynamic_shapes=dynamic_shapes,
        loss=loss,
        allocation=allocation,
        correct_bias=correct_bias,
        token_weights=token_weights,
        all_experts=all_experts,
        held_out=held_out,
        offload=offload,
        reconstruction=reconstruction,
        progress=progress,
    )
    module = programs.begin(model, sparsifier) if isinstance(model, ExportedProgram) else model
    store = MaskStore(module, sparsifier)
    report = calibrate(module, sparsifier, batches, mapping, store, options)
    if isinstance(model, ExportedProgram):
        return programs.finish(model, module), report  # type: ignore[return-value]
    return model, report


class PruneOptions(NamedTuple):
    """What `prune` takes beside model, method and data; see there."""

    sequential: Sequential | None = None
    dynamic_shapes: Any = None
    loss: Loss | None = None
    allocation: Allocation | None = None
    correct_bias: bool = False
    token_weights: Iterable[Tensor] | None = None
    all_experts: bool = False
    held_out: float = 0.0
    offload: str | os.PathLike[str] | None = None
    reconstruction: Reconstruction | None = None
    progress: bool = True

    def in_turn(self, sparsifier: CalibratedSparsifier) -> Sequential:
        """How the weights take turns: as asked for, or else as the method does it."""
        return sparsifier.sequential if self.sequential is None else self.sequential


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
    gradients = check_method(sparsifier, options)
    keep = offload_to(options.offload)
    read = hold_out(read_batches(model, batches, options.token_weights, keep), options.held_out)
    used = [batch for batch in read if not batch.held_out]
    with evaluating(model):
        with buffers_kept(model):
            check_forms(model, read)
            frame = capture(model, read, options.dynamic_shapes)._replace(keep=keep)
            decision = decide(frame, sparsifier, mapping, store.is_done)
            plans, weights = decision.plans, decision.weights
            biases = find_biases(frame, plans) if options.correct_bias else None
            rebuilder = None
            if options.reconstruction is None:
                pruner = Pruner(sparsifier, plans, weights, biases, store)
            else:
                assert isinstance(store, MaskStore)  # others write weight by weight
                store = held = HeldStore(store)
                pruner = Pruner(sparsifier, plans, weights, biases, held)
                rebuilder = Rebuilder(options.reconstruction, pruner, held)
            how = (options.in_turn(sparsifier), options.all_experts)
            calibration = Calibration(frame, pruner, store, read, *how, rebuilder)
            if frame.error is not None:
                _log.warning(
                    "no graph, so the statistics of %s are taken at once; for a graph, change what "
                    "this error names, or pass batches that do without it: %s",
                    "a block" if calibration.sequential else "all weights",
                    frame.error,
                )
            store.begin(frame.weights, plans, weights)
            if options.loss is not None and gradients:
                pruner.hold(collect_gradients(model, used, options.loss, weights))
            if options.allocation is not None:
                plans.update(
                    allocate(options.allocation, pruner, frame, decision, store, used, *how)
                )
            decision.dense.update(
                _prune_all(calibration, pruner, store, options.progress, rebuilder)
            )
        if options.correct_bias:
            estimate_batch_norms(model, used)
    report = PruningReport(
        rows=tuple(pruner.pruned),
        dense=decision.dense,
        sequential=calibration.sequential,
        reason=calibration.reason,
        batches=len(read),
        statistics_bytes=pruner.peak,
        activation_bytes=calibration.activation_bytes,
        seconds=time.perf_counter() - start,
        blocks=() if rebuilder is None else tuple(rebuilder.blocks),
    )
    for text in report.warnings:
        _log.warning("%s", text)
    return report


def check_method(sparsifier: CalibratedSparsifier, options: PruneOptions) -> frozenset[Statistic]:
    """Which statistics of gradients are needed.

    Raises:
        TypeError: the sparsifier needs no data.
        ValueError: it or the allocation needs gradients, and there is no loss; or `sequential` is
            neither of its values; or it rounds what is to be rebuilt.
    """
    if options.sequential not in (None, True, False, "blocks"):
        raise ValueError(
            f'sequential: expected None, True, False or "blocks", found {options.sequential!r}'
        )
    if not isinstance(sparsifier, CalibratedSparsifier):
        raise TypeError(
            f"sparsifier: expected a CalibratedSparsifier, found {type(sparsifier).__name__}, "
            "which needs no data; call prepare and step"
        )
    if options.reconstruction is not None and sparsifier.grid is not None:
        raise ValueError(
            "reconstruction: it would move weights off the grid that the method rounds them to; "
            "prune and rebuild without rounding, squash, then prune once more with "
            "Pipeline(MagnitudeSparsifier(), Rounding(...)), which keeps the zeros that are there"
        )
    gradients = GRADIENTS & (sparsifier.needs | needs_of(options.allocation, sparsifier))
    if gradients and options.loss is None:
        needy = sparsifier if sparsifier.needs & GRADIENTS else options.allocation
        raise ValueError(
            f"{type(needy).__name__} needs gradients: "
            "pass loss=, a function of what the model returns and the batch"
        )
    return gradients


def _prune_all(
    calibration: Iterable[str],
    pruner: Pruner,
    store: Store,
    progress: bool,
    rebuilder: Rebuilder | None,
) -> dict[str, str]:
    """Prune weight after weight; returns FQN -> the reason why one stays dense after all."""
    dense = {}
    try:
        with torch.no_grad(), show_progress("pruning", len(pruner.plans), progress) as advance:
            for fqn in calibration:
                reason = pruner.prune(fqn)
                if reason is not None:
                    dense[fqn] = reason
                    _log.warning("%s stays dense: %s", fqn, reason)
                advance(fqn, 1)
    except BaseException as error:
        if rebuilder is not None:
            rebuilder.abandon()
        _note(error, pruner, store)
        raise
    return dense


def _note(error: BaseException, pruner: Pruner, store: Store) -> None:
    """Add to an error what has been done so far."""
    done = len(pruner.pruned)
    if done:
        note = (
            f"{done} of {len(pruner.plans)} weights are pruned, the last of them "
            f"{pruner.pruned[-1].fqn}; the others are untouched. {store.how_to_resume}"
        )
        error.add_note(note)
        _log.warning("%s", note)
