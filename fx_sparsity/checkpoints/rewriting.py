"""Shards written anew, tensor by tensor: in another layout, and with some weights masked."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.checkpoints.checkpoint_record import CheckpointRecord, PackedMask, pack_mask
from fx_sparsity.checkpoints.ranking import Criterion
from fx_sparsity.masks import ScoreError
from fx_sparsity.progress import Advance
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


@dataclass(frozen=True)
class _Piece:
    """One tensor to be written, and its mask; None if it has none."""

    encoded: Encoded
    mask: PackedMask | None


class Rewriter:
    """Writes the shards of a checkpoint anew; one tensor is made while another one is written.

    Args:
        source: the checkpoint.
        layout: one of `LAYOUTS`.
        criterion: decides on the zeros; None leaves all tensors as they are.

    Raises:
        ValueError: an unknown layout.
        CheckpointError: an entry that is no plain tensor.
    """

    def __init__(self, source: Checkpoint, layout: str, criterion: Criterion | None) -> None:
        check_layout(layout, LAYOUTS)
        self._source, self._layout, self._criterion = source, layout, criterion
        for shard, file in source.files.items():
            if file.described:
                name = next(iter(file.described))
                raise CheckpointError(f"{name}: in {shard}, is no plain tensor; load it in a model")

    def size(self, shards: Sequence[str]) -> int:
        """Bytes of the tensors in some shards, as they are stored."""
        files = [self._source.files[shard] for shard in shards]
        return sum(file.stored_bytes(name) for file in files for name in file.forms)

    def write(
        self, paths: Mapping[str, Path], record: CheckpointRecord | None, advance: Advance
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Write one shard after the other.

        Args:
            paths: shard -> the file to be, whole or not at all.
            record: takes the masks.
            advance: called after every tensor, with its bytes as they were stored.

        Yields:
            Each shard that is written; for JSON, `weights`: name -> how many of its elements are
            masked and how many are zero, and `counts`, a `Counts`.
        """
        with contextlib.closing(prefetch(self._pieces([*paths]))) as pieces:
            for shard, path in paths.items():
                yield shard, self._write_shard(shard, path, pieces, record, advance)

    def _write_shard(
        self,
        shard: str,
        path: Path,
        pieces: Iterator[_Piece],
        record: CheckpointRecord | None,
        advance: Advance,
    ) -> dict[str, Any]:
        """Write the next pieces, which are those of `shard`."""
        source = self._source.files[shard]
        shapes = {name: source.dtype_and_shape(name)[1] for name in source.forms}
        counts = Counts()
        weights: dict[str, list[int]] = {}
        with replacing(path) as file:
            writer: PlainWriter | CompressedWriter
            if self._layout == "compressed":
                extra = {"same_as": source.same_as, "order": source.same_as and source.keys}
                writer = CompressedWriter(file, shapes, extra)
            else:
                metadata = {"format": "pt"} if source.ours else source.file.metadata
                writer = PlainWriter(file, shapes, metadata)
            for piece in itertools.islice(pieces, len(shapes)):
                name, mask = piece.encoded.name, piece.mask
                writer.write(piece.encoded)
                counts.add(piece.encoded)
                if mask is not None:
                    weights[name] = [mask.masked, mask.zeros]
                    self._note(record, name, mask)
                advance(name, source.stored_bytes(name))
                del piece, mask  # before the next one is waited for
            writer.finish()
        return {"weights": weights, "counts": asdict(counts)}

    def _note(self, record: CheckpointRecord | None, name: str, mask: PackedMask) -> None:
        if record is not None:
            assert self._criterion is not None
            record.add(name, mask, self._criterion.reached(name, mask.masked).level)

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
        tensor, mask = file.read(name, room), None
        if self._criterion is not None and name in self._criterion.assignment:
            mask = _bake(self._criterion, name, tensor)
        if self._layout == "compressed":
            return _Piece(encode_compressed(name, tensor), mask)
        return _Piece(encode_plain(name, tensor, self._layout), mask)


def _bake(criterion: Criterion, name: str, tensor: Tensor) -> PackedMask:
    """Write the zeros into a tensor."""
    try:
        keep = criterion.mask(name, tensor).contiguous()
    except ScoreError as error:
        raise ScoreError(f"{name}: {error}" if name not in str(error) else str(error)) from error
    keep_only(as_integers(tensor).view(-1), keep.view(-1))
    return pack_mask(keep, tensor)
