"""What a pruned checkpoint says of its weights: `sparsity.json`, and their masks."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.checkpoints.report import CheckpointReport
from fx_sparsity.patterns import Role, SparsityConfig
from fx_sparsity.sparsifier.record import ZEROS, masks_checksum, record_metadata
from fx_sparsity.storage.bit_packing import as_integers, find_bits
from fx_sparsity.storage.container import bytes_of
from fx_sparsity.storage.json_files import put_json, read_json

REPORT = "sparsity.json"
"""Name of the file that says what was asked of each weight, and how many zeros it has."""
RECORD = "sparsity.record"
"""Name of the file with the masks, which `SparsityRecord.load` reads."""

_PART = 1 << 20  # elements, where something is compared on the way
_LONG = 1.2345678901234567e-300  # no level takes more characters


class PackedMask(NamedTuple):
    """One weight's mask, packed as `MaskRecord` has it.

    Attributes:
        keep: a bit for each element that is kept.
        kept_zeros: a bit for each of them that is zero anyway; empty where there are none.
        masked, zeros: how many elements are not kept, and how many are zero.
    """

    keep: Tensor
    kept_zeros: Tensor
    masked: int
    zeros: int


def pack_mask(keep: Tensor, value: Tensor) -> PackedMask:
    """Pack a mask; beside the result, little memory is taken.

    Args:
        keep: boolean, True is kept.
        value: of the same shape, zero where nothing is kept.
    """
    packed, kept = find_bits(as_integers(keep.reshape(-1)))
    zeros, others = _find_others(value.reshape(-1))
    zeros.bitwise_not_().bitwise_and_(packed)
    masked, zero = keep.numel() - kept, keep.numel() - others
    if zero == masked:
        zeros = torch.empty(0, dtype=torch.uint8)  # a slice would hold on to the memory
    return PackedMask(packed, zeros, masked, zero)


def _find_others(flat: Tensor) -> tuple[Tensor, int]:
    """A bit for every element other than zero, and how many there are."""
    integers = as_integers(flat)
    if not len(flat) or integers.min() != torch.iinfo(integers.dtype).min:
        return find_bits(integers)
    bits, count = torch.empty(-(-len(flat) // 8), dtype=torch.uint8), 0
    for start in range(0, len(flat), _PART):  # -0.0, which is zero, has a bit that is not
        part, found = find_bits(as_integers(flat[start : start + _PART] != 0))
        bits[start // 8 : start // 8 + len(part)] = part
        count += found
    return bits, count


class CheckpointRecord:
    """The files `sparsity.json` and `sparsity.record` of a run, the latter written mask by mask.

    Masks go one behind the other into a safetensors file, whose header is written last, into room
    left for it. What lies behind the masks that are held is of a run that was killed.

    Args:
        folder: of the files.
        weights: name -> shape, roles, pattern and aliases of every weight that may come.
        held: name -> bytes of its mask and of its kept zeros, its level, and the checksum of both,
            in the order of the file; `add` adds to it.
    """

    def __init__(
        self, folder: Path, weights: Mapping[str, Mapping[str, Any]], held: dict[str, list[Any]]
    ) -> None:
        self._folder, self._weights, self._held = folder, weights, held
        self._path = folder / RECORD
        if not held:
            # Room for the longest header that there can be: all masks, each at the far end.
            sizes = {name: -(-torch.Size(w["shape"]).numel() // 8) for name, w in weights.items()}
            end = 2 * sum(sizes.values())
            places = {key: (end, size) for n, size in sizes.items() for key in (n, n + ZEROS)}
            most = {"level": _LONG, "crc32": 0xFFFFFFFF}
            longest = {name: {**weight, **most} for name, weight in weights.items()}
            room = len(_header(longest, places))
            room += -room % 8
            self._path.write_bytes(room.to_bytes(8, "little").ljust(8 + room))
        with open(self._path, "r+b") as file:
            self._room = int.from_bytes(file.read(8), "little")
            self._end = 8 + self._room + sum(mask + zeros for mask, zeros, *_ in held.values())
            file.truncate(self._end)

    def add(self, name: str, mask: PackedMask, level: float) -> None:
        """Write the mask of one weight, of which the share `level` was to go."""
        with open(self._path, "r+b") as file:
            file.seek(self._end)
            for bits in (mask.keep, mask.kept_zeros):
                file.write(bytes_of(bits))
                self._end += len(bits)
        sum_of_both = masks_checksum(mask.keep, mask.kept_zeros)
        self._held[name] = [len(mask.keep), len(mask.kept_zeros), level, sum_of_both]

    def sync(self) -> None:
        """Have all masks on the disk."""
        with open(self._path, "r+b") as file:
            os.fsync(file.fileno())

    def finish(self, report: CheckpointReport) -> None:
        """Write the header, and `sparsity.json`.

        Args:
            report: of the weights, by the names of their tensors in the checkpoint.
        """
        places, start = {}, 0
        for name, (*sizes, _, _) in self._held.items():
            for key, size in zip((name, name + ZEROS), sizes, strict=True):
                places[key] = (start, size)
                start += size
        weights = {
            name: {**self._weights[name], "level": level, "crc32": sum_of_both}
            for name, (*_, level, sum_of_both) in self._held.items()
        }
        header = _header(weights, places)
        with open(self._path, "r+b") as file:
            file.seek(8)
            file.write(header.ljust(self._room))
        self.sync()
        rows = {row.pop("fqn"): row for row in report.to_dict()["rows"]}
        put_json(self._folder / REPORT, {"version": 1, "weights": rows})


def stated_patterns(
    checkpoint: Checkpoint,
) -> tuple[dict[str, SparsityConfig], dict[str, tuple[Role, ...]]]:
    """Patterns that a checkpoint's `sparsity.json` states, and the roles of those weights' axes.

    Empty where there is no such file.

    Raises:
        FileFormatError: it is no JSON object.
        CheckpointError: it states nothing.
    """
    with _reading(checkpoint) as weights:
        stated = {n: w for n, w in weights.items() if w["pattern"] is not None}
        configs = {name: SparsityConfig.parse(weight["pattern"]) for name, weight in stated.items()}
        return configs, {name: tuple(weight["roles"]) for name, weight in stated.items()}


def stated_reasons(checkpoint: Checkpoint) -> dict[str, str]:
    """Why weights stay dense by a checkpoint's `sparsity.json`; empty where there is no such file.

    Raises:
        FileFormatError: it is no JSON object.
        CheckpointError: it states nothing.
    """
    with _reading(checkpoint) as weights:
        return {n: str(w["reason"]) for n, w in weights.items() if w["pattern"] is None}


@contextmanager
def _reading(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """The weights that `sparsity.json` speaks of, none without it; what else it is, is an error."""
    path = checkpoint.folder / REPORT
    there = checkpoint.is_folder and path.exists()
    found = read_json(path) if there else {"weights": {}}
    try:
        yield found["weights"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: states no patterns: {error!r}") from error


def _header(
    weights: Mapping[str, Mapping[str, Any]], places: Mapping[str, tuple[int, int]]
) -> bytes:
    """Of a file of masks; name -> first byte and number of bytes."""
    entries = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        for name, (start, size) in places.items()
    }
    return json.dumps({"__metadata__": record_metadata(weights), **entries}).encode()
