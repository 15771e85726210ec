"""Checkpoints larger than memory, sparsified or written in another layout, tensor by tensor."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fx_sparsity.checkpoints.checkpoint import CONFIG, Checkpoint
from fx_sparsity.checkpoints.checkpoint_record import RECORD, REPORT, CheckpointRecord
from fx_sparsity.checkpoints.ranking import Criterion
from fx_sparsity.checkpoints.report import CheckpointReport, CheckpointWeight
from fx_sparsity.checkpoints.rewriting import Layout, Rewriter
from fx_sparsity.checkpoints.run import Run, check_free
from fx_sparsity.checkpoints.weights import (
    Roles,
    assign,
    find_checkpoint_weights,
    weights_on_meta,
)
from fx_sparsity.graph import MappingLike
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.progress import progress as show_progress
from fx_sparsity.sparsifier import BaseDataSparsifier, DataNormSparsifier
from fx_sparsity.storage.compressed_file import CompressedFile
from fx_sparsity.storage.compressed_tensors import OUTSIDE
from fx_sparsity.storage.container import elements_of
from fx_sparsity.storage.json_files import put_json, read_json
from fx_sparsity.storage.sparsity_config import Counts, as_compressed, as_dense


@torch.no_grad()
def sparsify_checkpoint(
    source: str | Path,
    target: str | Path,
    mapping: MappingLike,
    sparsifier: BaseDataSparsifier | None = None,
    *,
    ranked: Literal["weight", "model"] = "weight",
    layout: Layout = "dense",
    roles: Roles | None = None,
    model: nn.Module | None = None,
    example_inputs: ExampleInputs | None = None,
    progress: bool = True,
) -> CheckpointReport:
    """Sparsify a checkpoint tensor by tensor, without its model's code or with it.

    The output has the same shards, an index that fits them, and the files beside them, except
    weights in other formats (`Checkpoint.skipped`). Memory holds no more than three times the
    largest tensor; codes of fp8 are ranked in single precision. A folder grows in
    `<target>.partial` and gets its name when it is complete. After an interruption the same call
    goes on; finished shards are not done again.

    Args:
        source: a folder of safetensors files, or one file. Not changed.
        target: a folder that is not there yet, or is empty; a file to be where `source` is one.
        mapping: which weight gets which pattern. Classes are not known here, but the kinds
            `linear`, `embedding` and `conv` are. What is no weight by its name, such as scales,
            positions and routers, stays dense unless it is named, see `assign`. What
            `config.json` ties may be called by either name.
        sparsifier: ranks weights by their values alone; magnitudes by default.
        ranked: `"model"` ranks the elements of all weights together, whose patterns must be
            `unstructured` at one level; `"weight"` ranks each for itself.
        layout: of the files. All but `"dense"` are for readers that know it.
        roles: of axes, where names and shapes do not tell, see `find_checkpoint_weights`.
        model: the architecture, such as `AutoModel.from_config(config)` on the meta device: tells
            which of its tensors are weights, and the roles of their axes. Not changed, nor are its
            data looked at. What the checkpoint calls otherwise is judged by name and shape.
        example_inputs: of the model, see `find_weights`; without them its classes are looked at.
        progress: True shows a bar on a terminal and log lines elsewhere, False nothing.

    Returns:
        What became of every weight. A folder says it, too, in the file `sparsity.json`, and has the
        masks in `sparsity.record`, which `SparsityRecord.load` reads.

    Raises:
        MappingError: the mapping does not fit the checkpoint.
        CheckpointError: `source` cannot be used, `target` is there already or was begun otherwise,
            another process is at work on it, `ranked="model"` with other patterns, or codes whose
            scale does not fit.
        FileFormatError: a file contradicts itself.
        ScoreError: a weight that cannot be ranked (NaN). Shards before it are finished.

    Examples:
        >>> fxs.export(nn.Linear(8, 4), "model.safetensors")
        >>> report = fxs.sparsify_checkpoint("model.safetensors", "sparse.safetensors", "2:4")
        >>> report["weight"].zeros, report["weight"].elements
        (16, 32)
    """
    checkpoint = Checkpoint(source)
    known = None if model is None else weights_on_meta(model, example_inputs)
    weights = find_checkpoint_weights(checkpoint, roles, known)
    assignment = assign(weights, mapping)
    sparsifier = DataNormSparsifier() if sparsifier is None else sparsifier
    criterion = Criterion(checkpoint, weights, assignment, sparsifier, ranked)
    if checkpoint.is_folder:
        done = _write_folder(checkpoint, Path(target), layout, criterion, progress)
    else:
        done = _write_file(checkpoint, Path(target), layout, criterion, progress)
    return _report(criterion, done)


def convert(
    source: str | Path, target: str | Path, layout: Layout = "dense", *, progress: bool = True
) -> None:
    """Write a checkpoint or a file anew in another layout, tensor by tensor.

    Args:
        source: a folder of safetensors files, or one file, in any of the layouts.
        target: as for `sparsify_checkpoint`.
        layout: of the files to be written.
        progress: as for `sparsify_checkpoint`.

    Raises:
        CheckpointError: `source` holds entries that only a model can read, or `target` is there
            already or was begun otherwise.
        FileFormatError: a file contradicts itself.
    """
    checkpoint = Checkpoint(source)
    write = _write_folder if checkpoint.is_folder else _write_file
    write(checkpoint, Path(target), layout, None, progress)


def _write_file(
    source: Checkpoint, target: Path, layout: str, criterion: Criterion | None, progress: bool
) -> list[dict[str, Any]]:
    """One file from one file; what `Rewriter.write` says of it. A kill leaves none."""
    rewriter = Rewriter(source, layout, criterion)
    check_free(target, is_folder=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    if criterion is not None:
        criterion.prepare(None)
    total, paths = rewriter.size(source.shards), {source.shards[0]: target}
    with show_progress(_doing(criterion), total, progress, in_bytes=True) as advance:
        return [written for _, written in rewriter.write(paths, None, advance)]


def _write_folder(
    source: Checkpoint, target: Path, layout: str, criterion: Criterion | None, progress: bool
) -> list[dict[str, Any]]:
    """A folder from a folder; what `Rewriter.write` says of each shard."""
    rewriter = Rewriter(source, layout, criterion)
    asked = {"verb": _doing(criterion), "layout": layout}
    asked |= criterion.describe() if criterion else {}
    with contextlib.closing(Run(source, target, asked)) as run:
        return _write_run(run, source, rewriter, layout, criterion, progress)


def _write_run(
    run: Run,
    source: Checkpoint,
    rewriter: Rewriter,
    layout: str,
    criterion: Criterion | None,
    progress: bool,
) -> list[dict[str, Any]]:
    run.begin({"known": None, "shards": {}, "masks": {}})
    record = None
    if criterion is not None:
        run.done["known"] = criterion.prepare(run.done["known"])
        run.save()
        record = CheckpointRecord(run.folder, _weights(criterion), run.done["masks"])
    paths = {s: run.folder / s for s in source.shards if s not in run.done["shards"]}
    total = rewriter.size([*paths])
    with show_progress(_doing(criterion), total, progress, in_bytes=True) as advance:
        for shard, written in rewriter.write(paths, record, advance):
            if record is not None:
                record.sync()
            run.done["shards"][shard] = written
            run.save()
    done = [run.done["shards"][shard] for shard in source.shards]
    anew = {REPORT, RECORD} if record is not None else set()
    if (config := _config(source, layout, done)) != source.config:
        anew.add(CONFIG)
        put_json(run.folder / CONFIG, config)
    run.copy([name for name in source.others if name not in anew])
    if source.index is not None:
        _write_index(source, source.index, run.folder)
    if record is not None and criterion is not None:
        record.finish(_report(criterion, done))
    run.finish()
    return done


def _doing(criterion: Criterion | None) -> str:
    return "converting" if criterion is None else "sparsifying"


def _weights(criterion: Criterion) -> dict[str, dict[str, Any]]:
    """What a record says of the weights, but for their levels."""
    sites = {fqn: criterion.weights[fqn] for fqn in criterion.assignment}
    return {
        fqn: {
            "shape": site.shape,
            "roles": site.roles,
            "pattern": str(criterion.assignment[fqn].pattern),
            "aliases": site.aliases,
        }
        for fqn, site in sites.items()
    }


def _report(criterion: Criterion, done: list[dict[str, Any]]) -> CheckpointReport:
    """What became of the weights, from what `Rewriter.write` says of each shard."""
    masked = {name: counts for shard in done for name, counts in shard["weights"].items()}
    dense = criterion.assignment.dense
    rows = [
        CheckpointWeight(
            fqn=site.fqn,
            pattern=str(criterion.reached(site.fqn, masked[site.fqn][0])) if found else None,
            reason="" if found else dense[site.fqn],
            roles=site.roles,
            elements=elements_of(site.shape),
            zeros=masked[site.fqn][1] if found else None,
        )
        for site in criterion.weights.sites
        for found in [site.fqn in masked]
    ]
    rows += [
        CheckpointWeight(other.fqn, None, other.text, (), elements_of(other.shape), None)
        for other in criterion.weights.dense
    ]
    return CheckpointReport(tuple(rows))


def _config(source: Checkpoint, layout: str, done: list[dict[str, Any]]) -> dict[str, Any]:
    """The model's configuration, with what says how its files are laid out."""
    config = as_dense(source.config)
    if layout == "compressed":
        return as_compressed(config) if config else config
    if layout not in OUTSIDE:
        return config
    counts = Counts()
    for shard in done:
        counts.merge(Counts(**shard["counts"]))
    return counts.configured(config, layout)


def _write_index(source: Checkpoint, name: str, folder: Path) -> None:
    """An index of the files in `folder`; in the order of the source, where names are the same."""
    files: Mapping[str, CompressedFile] = {s: CompressedFile(folder / s) for s in source.shards}
    index = read_json(source.folder / name)
    where = {key: shard for shard, file in files.items() for key in file.file.entries}
    total = sum(entry.nbytes for file in files.values() for entry in file.file.entries.values())
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    order = [key for key in index["weight_map"] if key in where]
    index["weight_map"] = {key: where[key] for key in dict.fromkeys([*order, *where])}
    put_json(folder / name, index)
