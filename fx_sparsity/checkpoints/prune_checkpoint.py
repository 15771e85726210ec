"""One-shot pruning of a checkpoint that need not fit into memory, from files to files."""

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fx_sparsity.checkpoints.checkpoint import Checkpoint
from fx_sparsity.checkpoints.loaded import LoadedModel
from fx_sparsity.checkpoints.mapped_checkpoint import MappedCheckpoint
from fx_sparsity.checkpoints.pruned_files import PrunedFiles
from fx_sparsity.checkpoints.run import Run
from fx_sparsity.graph.example_inputs import ExampleInputs, call_arguments
from fx_sparsity.graph.mapping import MappingLike
from fx_sparsity.pruning.batches import check_iterable
from fx_sparsity.pruning.methods import CalibratedSparsifier
from fx_sparsity.pruning.methods.calibrated import Sequential
from fx_sparsity.pruning.prune import GRADIENTS, PruneOptions, calibrate
from fx_sparsity.pruning.report import PruningReport

_COUNTERS = frozenset({"steps", "enable_mask_update", "_said_squashed"})


def prune_checkpoint(
    model: nn.Module,
    sparsifier: CalibratedSparsifier,
    batches: Iterable[ExampleInputs],
    mapping: MappingLike | None = None,
    *,
    source: str | Path,
    target: str | Path,
    names: Mapping[str, str] | None = None,
    sequential: Sequential = True,
    dynamic_shapes: Any = None,
    correct_bias: bool = False,
    token_weights: Iterable[Tensor] | None = None,
    all_experts: bool = False,
    held_out: float = 0.0,
    offload: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PruningReport:
    """Prune a checkpoint in one shot, as `prune` does a model, without ever loading it.

    The checkpoint is copied, and the model's parameters are the copy's files, mapped into memory:
    a weight is read from the disk where it is used, and its pages are the system's to take back.
    Pruned weights are written into the copy, one by one, bit for bit as `prune` would have them,
    with zeros in place of masks. In memory are the activations of all batches that are needed
    later, and a weight's statistics and its solution in single precision; the report has figures.

    The copy grows in `<target>.partial` and gets its name when it is complete. After an
    interruption, the same call goes on with the weights that are not done yet.

    Whatever is raised before the first weight is done, `target` and `source` are as they were.

    Args:
        model: the architecture; neither run nor changed. Parameters may be on the meta device, for
            their data are not looked at, and have the checkpoint's dtype in what follows. Buffers
            that the checkpoint lacks must be real: build under `parameters_on_meta()`.
        sparsifier: chooses masks and values. It is not bound to anything afterwards.
        batches: as `prune` takes them, on the CPU.
        mapping: as `prune` takes it.
        source: a folder of safetensors files, or one file. Not changed.
        target: a folder that is not there yet, or is empty. Its files are those of `source`, but
            for weights in other formats (`Checkpoint.skipped`), with `sparsity.json`, which says
            what was done, and the masks in `sparsity.record`, which `SparsityRecord.load` reads.
        names: FQN in the model -> name in the checkpoint, where they differ. What the checkpoint
            holds beyond the model is copied as it is, and listed in `report.dense`.
        sequential: as `prune` takes it, but True for every method by default: a run that was
            killed then goes on from any weight to the same result.
        dynamic_shapes: as `prune` takes it.
        correct_bias: as `prune` takes it.
        token_weights: as `prune` takes them.
        all_experts: as `prune` takes it.
        held_out: as `prune` takes it.
        offload: as `prune` takes it; but the batches themselves are held.
        progress: as `prune` takes it.

    Returns:
        What was done to each weight, before an interruption, too.

    Raises:
        CheckpointError: parameters that the checkpoint lacks or has in another shape or in codes,
            buffers without data, or `target` is there already or was begun otherwise.
        FileNotFoundError: see `Checkpoint`.
        FileFormatError: `source` is malformed.
        ValueError: the method needs gradients, which would take the room of all weights, or rounds.
        InputError, MappingError, PatternError, MaskError, CalibrationError: as `prune`.

    Examples:
        >>> fxs.export(nn.Linear(8, 4), "model.safetensors")
        >>> report = fxs.prune_checkpoint(
        ...     nn.Linear(8, 4),
        ...     fxs.WandaSparsifier(),
        ...     [(torch.randn(16, 8),)],
        ...     "2:4",
        ...     source="model.safetensors",
        ...     target="pruned",
        ... )
        >>> [(row.fqn, row.pattern, row.tokens) for row in report.rows]
        [('weight', '2:4', 16)]
    """
    if isinstance(sparsifier, CalibratedSparsifier) and sparsifier.needs & GRADIENTS:
        raise ValueError(
            f"{type(sparsifier).__name__} needs gradients of all weights at once; "
            "load the model and call prune"
        )
    if isinstance(sparsifier, CalibratedSparsifier) and sparsifier.grid is not None:
        raise ValueError(
            f"{type(sparsifier).__name__} rounds to a grid, and a checkpoint has no place for its "
            "scales; load the model and call prune, or leave out Rounding"
        )
    check_iterable(batches)
    batches, checkpoint = list(batches), Checkpoint(source)
    token_weights = None if token_weights is None else list(token_weights)
    held = MappedCheckpoint(checkpoint)
    loaded = LoadedModel(model, held, dict(names or {}))
    asked = {
        "verb": "pruning",
        "method": _description(sparsifier),
        "sequential": sequential,
        "correct_bias": correct_bias,
        "all_experts": all_experts,
        "held_out": held_out,
        "batches": _digest([*batches, *(token_weights or ())]),
    }
    options = PruneOptions(
        sequential=sequential,
        dynamic_shapes=dynamic_shapes,
        correct_bias=correct_bias,
        token_weights=token_weights,
        all_experts=all_experts,
        held_out=held_out,
        offload=offload,
        progress=progress,
    )
    with contextlib.closing(Run(checkpoint, Path(target), asked)) as run:
        store = PrunedFiles(run, checkpoint, held, loaded, sequential)
        report = calibrate(loaded.model, sparsifier, batches, mapping, store, options)
        dense = {fqn: reason for fqn, reason in report.dense.items() if fqn not in store.rows}
        store.finish(dense)
    surplus = dict.fromkeys(loaded.surplus, "the model has no such tensor; copied")
    return replace(report, rows=tuple(store.rows.values()), dense={**dense, **surplus})


def _description(part: Any) -> str:
    """A method and its settings, in words that are the same for the same settings."""
    settings = []
    for name, value in sorted(vars(part).items()):
        if isinstance(value, tuple):  # the steps of a pipeline
            settings += [_description(step) for step in value]
        elif isinstance(value, CalibratedSparsifier):
            settings.append(_description(value))
        elif callable(value):
            settings.append(getattr(value, "__qualname__", repr(value)))
        elif isinstance(value, int | float | str) and name not in _COUNTERS:
            settings.append(f"{name}={value!r}")
    return f"{type(part).__name__}({', '.join(settings)})"


def _digest(batches: Sequence[ExampleInputs]) -> str:
    """Stands for calibration data: the same for the same bits."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        leaves, spec = pytree.tree_flatten(call_arguments(batch))
        digest.update(repr(spec).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                data = leaf.detach().cpu().contiguous()
                digest.update(repr((data.dtype, data.shape)).encode())
                digest.update(ctypes.string_at(data.data_ptr(), data.nbytes))
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()
