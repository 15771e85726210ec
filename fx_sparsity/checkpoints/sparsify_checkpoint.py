"""Checkpoints larger than memory, sparsified or written in another layout, tensor by tensor."""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fx_sparsity.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Roles,
    find_checkpoint_weights,
)
from fx_sparsity.checkpoints.ranking import Criterion
from fx_sparsity.graph import MappingLike, SparsityMapping, WeightMap
from fx_sparsity.masks import ScoreError
from fx_sparsity.patterns import Role, SparsityConfig
from fx_sparsity.reports import WeightReport, format_table
from fx_sparsity.sparsifier import BaseDataSparsifier, DataNormSparsifier
from fx_sparsity.storage.bit_packing import as_integers, keep_only
from fx_sparsity.storage.compressed_file import CompressedFile
from fx_sparsity.storage.compressed_tensors import OUTSIDE
from fx_sparsity.storage.container import elements_of, replacing
from fx_sparsity.storage.prefetch import prefetch
from fx_sparsity.storage.sparsity_config import Counts
from fx_sparsity.storage.writing import (
    CompressedWriter,
    Encoded,
    PlainWriter,
    check_layout,
    encode_compressed,
    encode_plain,
)

Layout = Literal["dense", "compressed", "sparse-bitmask", "sparse-24-bitmask"]
LAYOUTS: tuple[str, ...] = ("dense", "compressed", *OUTSIDE)
"""How the files of a checkpoint hold tensors; `compressed` is what `save` writes."""

REPORT = "sparsity.json"
"""File that a sparsified checkpoint carries: what was asked of each weight, and its zeros."""

_PROGRESS = ".sparsify-progress.json"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""


@dataclass(frozen=True)
class CheckpointWeight:
    """What became of one weight of a checkpoint.

    Attributes:
        fqn: its name.
        pattern: and level, as `SparsityConfig.parse` reads them; None where it stays dense.
        reason: why it stays dense; empty otherwise.
        roles: of its axes.
        elements, zeros: of it, as written; zeros are not counted where it stays dense.
    """

    fqn: str
    pattern: str | None
    reason: str
    roles: tuple[Role, ...]
    elements: int
    zeros: int | None


@dataclass(frozen=True)
class CheckpointReport(WeightReport[CheckpointWeight]):
    """Name -> `CheckpointWeight`, for every weight of a checkpoint."""

    rows: tuple[CheckpointWeight, ...]

    @property
    def dense(self) -> dict[str, str]:  # type: ignore[override]
        """Name -> the reason why it stays dense."""
        return {row.fqn: row.reason for row in self.rows if row.pattern is None}

    def __str__(self) -> str:
        cells = [
            (row.fqn, row.pattern or "dense", row.zeros, row.elements, row.reason)
            for row in self.rows
        ]
        return format_table(("weight", "pattern", "zeros", "of", "stays dense because"), cells)


@torch.no_grad()
def sparsify_checkpoint(
    src: str | Path,
    dst: str | Path,
    mapping: MappingLike,
    sparsifier: BaseDataSparsifier | None = None,
    *,
    ranked: Literal["weight", "model"] = "weight",
    layout: Layout = "dense",
    roles: Roles | None = None,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Sparsify a checkpoint without its model's code, tensor by tensor.

    The output has the same shards, an index that fits them, and the files beside them, except
    weights in other formats (`Checkpoint.skipped`). Memory holds no
    more than three times the largest tensor. What was interrupted goes on when called again with
    the same arguments; finished shards are not done again.

    Args:
        src: a folder of safetensors files, or one file. Not changed.
        dst: a folder that is not there yet, is empty, or holds an interrupted run; a file where
            `src` is one.
        mapping: which weight gets which pattern. Classes are not known here, but the kinds
            `linear`, `embedding` and `conv` are.
        sparsifier: ranks weights by their values alone; magnitudes by default.
        ranked: `"model"` ranks the elements of all weights together, whose patterns must be
            `unstructured` at one level; `"weight"` ranks each for itself.
        layout: of the files. All but `"dense"` are for readers that know it.
        roles: of axes, where names and shapes do not tell, see `find_checkpoint_weights`.
        progress: called after every tensor.

    Returns:
        What became of every weight; also in the file `sparsity.json` of a folder.

    Raises:
        MappingError: the mapping does not fit the checkpoint.
        CheckpointError: `src` or `dst` cannot be used; or `ranked="model"` with other patterns.
        FileFormatError: a file contradicts itself.
        ScoreError: a weight that cannot be ranked (NaN). Shards before it are finished.
    """
    source = Checkpoint(src)
    weights = find_checkpoint_weights(source, roles)
    assignment = SparsityMapping.of(mapping).resolve(weights)
    sparsifier = DataNormSparsifier() if sparsifier is None else sparsifier
    criterion = Criterion(source, weights, assignment, sparsifier, ranked)
    run = _Run(source, Path(src), Path(dst), layout, criterion, progress)
    return run.finish()


def convert(
    src: str | Path,
    dst: str | Path,
    layout: Layout = "dense",
    *,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint or a file anew in another layout, tensor by tensor.

    Args:
        src: a folder of safetensors files, or one file, in any of the layouts.
        dst: as for `sparsify_checkpoint`.
        layout: of the files to be written.
        progress: called after every tensor.

    Raises:
        CheckpointError: `src` or `dst` cannot be used, or holds entries that only a model can read.
        FileFormatError: a file contradicts itself.
    """
    source = Checkpoint(src)
    nothing = SparsityMapping().resolve(WeightMap(()))
    criterion = Criterion(source, WeightMap(()), nothing, DataNormSparsifier(), "weight")
    _Run(source, Path(src), Path(dst), layout, criterion, progress).finish()


def stated_patterns(
    checkpoint: Checkpoint,
) -> tuple[dict[str, SparsityConfig], dict[str, tuple[Role, ...]]]:
    """Patterns that a checkpoint's `sparsity.json` states, and the roles of those weights' axes.

    Empty where there is no such file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = checkpoint.folder / REPORT
    if not checkpoint.is_folder or not path.exists():
        return {}, {}
    try:
        weights = json.loads(path.read_text())["weights"]
        stated = {n: w for n, w in weights.items() if w["pattern"] is not None}
        configs = {name: SparsityConfig.parse(weight["pattern"]) for name, weight in stated.items()}
        return configs, {name: tuple(weight["roles"]) for name, weight in stated.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: states no patterns: {error!r}") from error


@dataclass(frozen=True)
class _Piece:
    """One tensor to be written, and how many zeros masking left in it; None if it is not masked."""

    encoded: Encoded
    zeros: int | None


class _Run:
    """One pass over a checkpoint that may be interrupted, and taken up again, at any moment."""

    def __init__(
        self,
        source: Checkpoint,
        src: Path,
        dst: Path,
        layout: str,
        criterion: Criterion,
        progress: Progress | None,
    ) -> None:
        check_layout(layout, LAYOUTS)
        self._source, self._layout, self._criterion = source, layout, criterion
        self._progress, self._done = progress, 0
        self._single = not src.is_dir()
        self._folder = dst.parent if self._single else dst
        self._names = {s: dst.name if self._single else s for s in source.shards}
        self._log = self._folder / (f".{dst.name}{_PROGRESS}" if self._single else _PROGRESS)
        for shard, file in source.files.items():
            if file.described:
                name = next(iter(file.described))
                raise CheckpointError(f"{name}: in {shard}, is no plain tensor; load it in a model")
        self._plan = self._fingerprint()
        self._check_place(src, dst)
        self._state: dict[str, Any] = {"plan": self._plan, "known": None, "shards": {}}

    def finish(self) -> CheckpointReport:
        """Do what is left to do."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._log.exists():
            self._state = json.loads(self._log.read_text())
        for left in self._leftovers():
            left.unlink()
        self._save_log()
        self._state["known"] = self._criterion.prepare(self._state["known"])
        self._save_log()
        todo = [s for s in self._source.shards if not (self._folder / self._names[s]).exists()]
        with contextlib.closing(prefetch(self._pieces(todo))) as pieces:
            for shard in todo:
                self._write_shard(shard, pieces)
        results = self._results()
        if not self._single:
            self._finish_folder(results)
        self._log.unlink()
        return results

    def _leftovers(self) -> list[Path]:
        """Unfinished files of a killed run."""
        if not self._single:
            return list(self._folder.rglob(".*.part"))
        names = (*self._names.values(), self._log.name)
        return [path for name in names for path in self._folder.glob(f".{_escaped(name)}.*.part")]

    def _fingerprint(self) -> str:
        """Changes with the source, what is done to it, and how it is written."""
        stats = [(s, (self._source.folder / s).stat()) for s in self._source.shards]
        source = [(shard, stat.st_size, stat.st_mtime_ns) for shard, stat in stats]
        plan = [source, self._layout, self._criterion.describe()]
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()

    def _check_place(self, src: Path, dst: Path) -> None:
        if src.resolve() == dst.resolve():
            raise CheckpointError(f"{dst}: source and destination are the same")
        if self._log.exists():
            if json.loads(self._log.read_text())["plan"] != self._plan:
                raise CheckpointError(
                    f"{dst}: holds an unfinished run with another source or other settings; "
                    "delete it, or repeat that"
                )
        elif dst.exists() and (self._single or not dst.is_dir() or any(dst.iterdir())):
            raise CheckpointError(f"{dst}: is there already")

    def _save_log(self) -> None:
        with replacing(self._log) as file:
            file.write(json.dumps(self._state).encode())

    def _write_shard(self, shard: str, pieces: Iterator[_Piece]) -> None:
        """Write the next pieces, which are those of `shard`."""
        source = self._source.files[shard]
        shapes = {name: source.dtype_and_shape(name)[1] for name in source.forms}
        counts = Counts()
        weights: dict[str, int] = {}
        with replacing(self._folder / self._names[shard]) as file:
            writer: PlainWriter | CompressedWriter
            if self._layout == "compressed":
                extra = {"same_as": source.same_as, "order": source.same_as and source.keys}
                writer = CompressedWriter(file, shapes, extra)
            else:
                metadata = {"format": "pt"} if source.ours else source.file.metadata
                writer = PlainWriter(file, shapes, metadata)
            for piece in itertools.islice(pieces, len(shapes)):
                writer.write(piece.encoded)
                counts.add(piece.encoded)
                if piece.zeros is not None:
                    weights[piece.encoded.name] = piece.zeros
                self._tell(shard, source.stored_bytes(piece.encoded.name))
                del piece  # before the next one is waited for
            writer.finish()
            self._state["shards"][shard] = {"weights": weights, "counts": asdict(counts)}
            self._save_log()

    @torch.no_grad()
    def _pieces(self, shards: Sequence[str]) -> Iterator[_Piece]:
        """The tensors of `shards`, masked and encoded.

        A piece is good until the next but one: dense ones take turns in the same memory, which is
        so touched first only once. Encoding copies the others anyway.
        """
        files = self._source.files
        todo = [(files[shard], name) for shard in shards for name in files[shard].forms]
        kinds = [file.dtype_and_shape(name) for file, name in todo]
        largest = max((dtype.itemsize * elements_of(shape) for dtype, shape in kinds), default=0)
        dense = self._layout == "dense"
        rooms = [torch.empty(largest, dtype=torch.uint8) if dense else None for _ in range(2)]
        for i, (file, name) in enumerate(todo):
            if i + 1 < len(todo):
                todo[i + 1][0].ask_for(todo[i + 1][1])
            yield self._piece(file, name, rooms[i % 2])

    def _piece(self, file: CompressedFile, name: str, room: Tensor | None) -> _Piece:
        tensor, zeros = file.read(name, room), None
        if name in self._criterion.assignment:
            zeros = self._sparsify(name, tensor)
        if self._layout == "compressed":
            return _Piece(encode_compressed(name, tensor), zeros)
        return _Piece(encode_plain(name, tensor, self._layout), zeros)

    def _sparsify(self, name: str, tensor: Tensor) -> int:
        """Bake the zeros into a tensor; returns how many elements are zero."""
        try:
            keep = self._criterion.mask(name, tensor)
        except ScoreError as error:
            raise ScoreError(
                f"{name}: {error}" if name not in str(error) else str(error)
            ) from error
        kept = keep_only(as_integers(tensor).view(-1), keep.contiguous().view(-1))
        return tensor.numel() - kept

    def _results(self) -> CheckpointReport:
        zeros: dict[str, int] = {}
        for entry in self._state["shards"].values():
            zeros.update(entry["weights"])
        found = self._criterion.assignment
        rows = [
            CheckpointWeight(
                fqn=site.fqn,
                pattern=str(found[site.fqn]) if site.fqn in found else None,
                reason=found.dense.get(site.fqn, ""),
                roles=site.roles,
                elements=elements_of(site.shape),
                zeros=zeros.get(site.fqn),
            )
            for site in self._criterion.weights.sites
        ]
        rows += [
            CheckpointWeight(other.fqn, None, other.text, (), elements_of(other.shape), None)
            for other in self._criterion.weights.dense
        ]
        return CheckpointReport(tuple(rows))

    def _finish_folder(self, results: CheckpointReport) -> None:
        anew = {REPORT} if results else set()
        if self._layout in OUTSIDE:
            anew.add("config.json")
        for name in self._source.others:
            if name in anew:
                continue
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (
                open(self._source.folder / name, "rb") as original,
                replacing(self._folder / name) as file,
            ):
                shutil.copyfileobj(original, file)
        written = {shard: CompressedFile(self._folder / shard) for shard in self._source.shards}
        if self._source.index is not None:
            self._write_index(written)
        if self._layout in OUTSIDE:
            config = self._source.folder / "config.json"
            found = json.loads(config.read_text()) if config.exists() else {}
            counts = Counts()
            for entry in self._state["shards"].values():
                counts.merge(Counts(**entry["counts"]))
            self._put("config.json", counts.configured(found, self._layout))
        if results:
            report = {row.pop("fqn"): row for row in results.to_dict()["rows"]}
            self._put(REPORT, {"version": 1, "weights": report})

    def _write_index(self, files: Mapping[str, CompressedFile]) -> None:
        assert self._source.index is not None
        index = json.loads((self._source.folder / self._source.index).read_text())
        where = {key: shard for shard, file in files.items() for key in file.file.entries}
        total = sum(entry.nbytes for file in files.values() for entry in file.file.entries.values())
        known = index.get("metadata") or {}
        index["metadata"] = {**known, "total_size": total}
        # In the order of the source, where the names are the same.
        order = [name for name in index["weight_map"] if name in where]
        index["weight_map"] = {name: where[name] for name in dict.fromkeys([*order, *where])}
        self._put(self._source.index, index)

    def _put(self, name: str, content: Any) -> None:
        with replacing(self._folder / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")

    def _tell(self, shard: str, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(shard, self._done, self._source.nbytes)


def _escaped(name: str) -> str:
    """A name as a pattern for `glob` that matches it alone."""
    return re.sub(r"([\[\]*?])", r"[\1]", name)
