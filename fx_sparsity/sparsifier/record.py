"""What masking leaves behind: which elements were pruned, and to what pattern."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.patterns import ROLES, Pattern, Role, Tiling
from fx_sparsity.sparsifier.core import SparsifierCore, roles_of

if TYPE_CHECKING:
    from fx_sparsity.storage.container import SafetensorsFile

ZEROS = "::zeros"
"""Behind a weight's name: the kept zeros, in a record's file."""
_METADATA = "sparsity_record"
_CHECKSUM = "sparsity_record_checksum"


@dataclass(frozen=True)
class MaskRecord:
    """One masked weight.

    Attributes:
        shape: of the weight.
        roles: of its axes.
        pattern: as `Pattern.parse` reads it; None for a method without one.
        level: share that was to go; None without a pattern.
        packed: the mask, one bit an element, row-major, low bit first; a set bit is kept.
        packed_zeros: the kept elements that were zero anyway when the record was made, packed like
            the mask; empty where there were none.
        aliases: further names of the weight, where it is tied or its module is shared.
        lost_zeros: why its zeros are none where it is used; empty where they survive.
    """

    shape: tuple[int, ...]
    roles: tuple[Role, ...]
    pattern: str | None
    level: float | None
    packed: Tensor
    packed_zeros: Tensor
    aliases: tuple[str, ...] = ()
    lost_zeros: str = ""

    @property
    def keep(self) -> Tensor:
        """The mask: boolean, of the weight's shape, True is kept."""
        return unpack_bits(self.packed, self.shape)

    @property
    def kept_zeros(self) -> Tensor:
        """Kept elements that were zero anyway: boolean, of the weight's shape."""
        if not len(self.packed_zeros):
            return torch.zeros(self.shape, dtype=torch.bool)
        return unpack_bits(self.packed_zeros, self.shape)

    @property
    def tiling(self) -> Tiling | None:
        """The pattern in storage dimensions."""
        if self.pattern is None:
            return None
        return Pattern.parse(self.pattern).tiling(self.shape, self.roles)


class SparsityRecord(Mapping[str, MaskRecord]):
    """FQN -> `MaskRecord`, in the order of masking. Outlives squashing; `verify` reads it."""

    def __init__(self, weights: Mapping[str, MaskRecord]) -> None:
        self._weights = dict(weights)

    @classmethod
    def of(
        cls, sparsifier: SparsifierCore, aliases: Mapping[str, Sequence[str]] | None = None
    ) -> "SparsityRecord":
        """Record every mask that `sparsifier` holds now, squashed or not.

        Args:
            sparsifier: its masks, and what it knows of patterns.
            aliases: further names of tied weights; read off the sparsifier's model by default.
        """
        known = sparsifier.aliases() if aliases is None else aliases
        weights = {}
        for name in sparsifier.names:
            config = sparsifier.config_of(name)
            mask = sparsifier.get_mask(name)
            keep = mask if mask.dtype == torch.bool else mask != 0
            zeros = (sparsifier.get_data(name, return_original=False) == 0) & keep
            pattern = None if sparsifier.is_given(name) else sparsifier.pattern_of(config)
            weights[name] = MaskRecord(
                shape=tuple(keep.shape),
                roles=roles_of(config, keep.ndim),
                pattern=None if pattern is None else str(pattern[0]),
                level=None if pattern is None else pattern[1],
                packed=pack_bits(keep),
                packed_zeros=pack_bits(zeros) if zeros.any() else pack_bits(zeros[:0].reshape(0)),
                aliases=tuple(known.get(name, ())),
                lost_zeros=config.get("lost_zeros", ""),
            )
        return cls(weights)

    def save(self, path: str | Path) -> None:
        """Write the record as one safetensors file: the masks, and the rest as JSON metadata.

        The file appears whole or not at all. Each mask has a checksum, and so has the header.
        """
        # Here, since the package of files needs this one.
        from fx_sparsity.storage.container import SafetensorsWriter, bytes_of, checksum, replacing

        meta: dict[str, dict[str, Any]] = {}
        masks: dict[str, Tensor] = {}
        for name, weight in self.items():
            mine = {name: weight.packed.cpu(), name + ZEROS: weight.packed_zeros.cpu()}
            masks |= mine
            meta[name] = {
                "shape": weight.shape,
                "roles": weight.roles,
                "pattern": weight.pattern,
                "level": weight.level,
                "aliases": weight.aliases,
                "crc32": checksum([bytes_of(mask) for mask in mine.values()]),
                **({"lost_zeros": weight.lost_zeros} if weight.lost_zeros else {}),
            }
        metadata = record_metadata(meta, {name: len(mask) for name, mask in masks.items()})
        room = len(json.dumps(metadata)) + sum(len(json.dumps(name)) + 128 for name in masks) + 64
        with replacing(path) as file:
            writer = SafetensorsWriter(file, room)
            for name, mask in masks.items():
                writer.add(name, mask)
            writer.finish(metadata)

    @classmethod
    def load(cls, path: str | Path) -> "SparsityRecord":
        """Read what `save` wrote; everything that it says is checked, and all checksums.

        Raises:
            FileFormatError: a `ValueError`: the file holds no record, or a damaged one; the weight
                is named.
            OSError: it cannot be read.
        """
        from fx_sparsity.storage.container import DTYPE_NAMES, FileFormatError, SafetensorsFile
        from fx_sparsity.storage.writing import header_checksum

        file = SafetensorsFile(path)
        text = file.metadata.get(_METADATA)
        if text is None:
            raise FileFormatError(f"{path}: holds no sparsity record")
        shapes = {name: (DTYPE_NAMES[e.dtype], e.shape) for name, e in file.entries.items()}
        if file.metadata.get(_CHECKSUM) != header_checksum(text, shapes):
            raise FileFormatError(f"{path}: its header does not match the header's checksum")
        try:
            found = json.loads(text)
            names = [*found, *(name + ZEROS for name in found)]
            if sorted(names) != sorted(file.entries):
                raise ValueError("expected two masks for each weight that it lists")
        except (ValueError, TypeError, RecursionError) as error:
            raise FileFormatError(f"{path}: its metadata cannot be read: {error}") from error
        return cls({name: _read(file, name, entry) for name, entry in found.items()})

    def __getitem__(self, name: str) -> MaskRecord:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return f"SparsityRecord({len(self)} weights)"


def record_metadata(
    weights: Mapping[str, Mapping[str, Any]], masks: Mapping[str, int]
) -> dict[str, str]:
    """What the header of a record's file says.

    Args:
        weights: name -> shape, roles, pattern, level and aliases, as `MaskRecord` has them, and
            the checksum of its masks.
        masks: name in the file -> bytes.
    """
    from fx_sparsity.storage.writing import header_checksum

    text = json.dumps(weights)
    entries = {name: ("U8", (size,)) for name, size in masks.items()}
    return {_METADATA: text, _CHECKSUM: header_checksum(text, entries)}


def _read(file: "SafetensorsFile", name: str, entry: Any) -> MaskRecord:
    """One weight of a file, checked."""
    from fx_sparsity.storage.container import FileFormatError, checksum

    keys = {"shape", "roles", "pattern", "level", "aliases", "crc32"}
    if not isinstance(entry, dict) or set(entry) - {"lost_zeros"} != keys:
        raise FileFormatError(f"{name}: expected {', '.join(sorted(keys))}")
    found = checksum([file.raw(key) for key in (name, name + ZEROS)])
    if found != entry["crc32"]:
        raise FileFormatError(f"{name}: expected checksum {entry['crc32']!r}, found {found}")
    record = MaskRecord(
        **_described(name, entry), packed=file.read(name), packed_zeros=file.read(name + ZEROS)
    )
    elements = math.prod(record.shape)
    for mask, sizes in ((record.packed, (elements,)), (record.packed_zeros, (elements, 0))):
        if mask.dtype != torch.uint8 or mask.shape not in [(-(-n // 8),) for n in sizes]:
            raise FileFormatError(
                f"{name}: expected a mask of {elements} bits, found {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        if elements % 8 and len(mask) and int(mask[-1]) >> elements % 8:
            raise FileFormatError(f"{name}: its mask has bits behind the last of {elements}")
    if len(record.packed_zeros) and bool((record.packed_zeros & ~record.packed).any()):
        raise FileFormatError(f"{name}: elements are both masked and kept")
    return record


def _described(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a weight beside its masks, checked."""
    from fx_sparsity.storage.container import FileFormatError, check_shape

    shape = check_shape(name, entry["shape"])
    roles, pattern, level, aliases = (
        entry[key] for key in ("roles", "pattern", "level", "aliases")
    )
    lost = entry.get("lost_zeros", "")
    if not isinstance(lost, str):
        raise FileFormatError(f"{name}: expected words for lost_zeros, found {lost!r}")
    for key, texts in (("roles", roles), ("aliases", aliases)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FileFormatError(f"{name}: expected a list of {key}, found {texts!r}")
    if len(roles) != len(shape) or not set(roles) <= set(ROLES):
        raise FileFormatError(f"{name}: expected roles of {shape}, found {roles}")
    if level is not None and not (isinstance(level, int | float) and 0 <= level <= 1):
        raise FileFormatError(f"{name}: expected a level in [0, 1], found {level!r}")
    try:
        if pattern is not None:
            Pattern.parse(pattern).tiling(shape, roles)
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{name}: its pattern {pattern!r}: {error}") from error
    return {
        "shape": shape,
        "roles": tuple(roles),
        "pattern": pattern,
        "level": level,
        "aliases": tuple(aliases),
        "lost_zeros": lost,
    }
