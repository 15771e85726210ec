"""What masking leaves behind: which elements were pruned, and to what pattern."""

import ctypes
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.patterns import ROLES, Pattern, Role, Tiling
from fx_sparsity.sparsifier.core import SparsifierCore, roles_of

ZEROS = "::zeros"
"""Behind a weight's name: the kept zeros, in a record's file."""
_METADATA = "sparsity_record"
_CHECKSUM = "sparsity_record_checksum"


class RecordError(FxSparsityError, ValueError):
    """A file holds no sparsity record, or a damaged one."""


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
            pattern = sparsifier.asked_of(name)
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

        Each mask has a checksum, and so has what is said of them all.
        """
        from safetensors.torch import save_file  # here, since it takes a while to import

        meta: dict[str, dict[str, Any]] = {}
        masks: dict[str, Tensor] = {}
        for name, weight in self.items():
            both = weight.packed.cpu(), weight.packed_zeros.cpu()
            masks[name], masks[name + ZEROS] = both
            meta[name] = {
                "shape": weight.shape,
                "roles": weight.roles,
                "pattern": weight.pattern,
                "level": weight.level,
                "aliases": weight.aliases,
                "crc32": masks_checksum(*both),
                **({"lost_zeros": weight.lost_zeros} if weight.lost_zeros else {}),
            }
        save_file(masks, path, metadata=record_metadata(meta))

    @classmethod
    def load(cls, path: str | Path) -> "SparsityRecord":
        """Read what `save` wrote; everything that it says is checked, and all checksums.

        Raises:
            RecordError: the file holds no record, or a damaged one; the weight is named.
            OSError: it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise RecordError(f"{path}: not a whole safetensors file: {error}") from error
        if _METADATA not in metadata:
            raise RecordError(f"{path}: holds no sparsity record")
        text = metadata[_METADATA]
        if metadata.get(_CHECKSUM) != _text_checksum(text):
            raise RecordError(f"{path}: what it says of its masks does not match the checksum")
        try:
            found = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise RecordError(f"{path}: its metadata cannot be read: {error}") from error
        if masks.keys() != {key for name in found for key in (name, name + ZEROS)}:
            raise RecordError(f"{path}: expected two masks for each weight that it lists")
        return cls({n: _read(n, entry, masks[n], masks[n + ZEROS]) for n, entry in found.items()})

    def __getitem__(self, name: str) -> MaskRecord:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return f"SparsityRecord({len(self)} weights)"


def record_metadata(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What the header of a record's file says.

    Args:
        weights: name -> shape, roles, pattern, level and aliases, as `MaskRecord` has them, and
            `crc32`, see `masks_checksum`.
    """
    text = json.dumps(weights)
    return {_METADATA: text, _CHECKSUM: _text_checksum(text)}


def masks_checksum(*masks: Tensor) -> int:
    """CRC-32 of a weight's mask and of its kept zeros, one behind the other."""
    value = 0
    for mask in masks:
        value = zlib.crc32(ctypes.string_at(mask.data_ptr(), mask.nbytes), value)
    return value


def _text_checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _read(name: str, entry: Any, packed: Tensor, zeros: Tensor) -> MaskRecord:
    """One weight of a file, checked."""
    keys = {"shape", "roles", "pattern", "level", "aliases", "crc32"}
    if not isinstance(entry, dict) or set(entry) - {"lost_zeros"} != keys:
        raise RecordError(f"{name}: expected {', '.join(sorted(keys))}")
    found = masks_checksum(packed, zeros)
    if found != entry["crc32"]:
        raise RecordError(f"{name}: expected checksum {entry['crc32']!r}, found {found}")
    record = MaskRecord(**_described(name, entry), packed=packed, packed_zeros=zeros)
    elements = math.prod(record.shape)
    for mask, sizes in ((packed, (elements,)), (zeros, (elements, 0))):
        if mask.dtype != torch.uint8 or mask.shape not in [(-(-n // 8),) for n in sizes]:
            raise RecordError(
                f"{name}: expected a mask of {elements} bits, found {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        if elements % 8 and len(mask) and int(mask[-1]) >> elements % 8:
            raise RecordError(f"{name}: its mask has bits behind the last of {elements}")
    if len(zeros) and bool((zeros & ~packed).any()):
        raise RecordError(f"{name}: elements are both masked and kept")
    return record


def _described(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a weight beside its masks, checked."""
    shape, roles, pattern, level, aliases = (
        entry[key] for key in ("shape", "roles", "pattern", "level", "aliases")
    )
    lost = entry.get("lost_zeros", "")
    if not isinstance(lost, str):
        raise RecordError(f"{name}: expected words for lost_zeros, found {lost!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise RecordError(f"{name}: expected a shape, found {shape!r}")
    for key, texts in (("roles", roles), ("aliases", aliases)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RecordError(f"{name}: expected a list of {key}, found {texts!r}")
    if len(roles) != len(shape) or not set(roles) <= set(ROLES):
        raise RecordError(f"{name}: expected roles of {shape}, found {roles}")
    if level is not None and not (isinstance(level, int | float) and 0 <= level <= 1):
        raise RecordError(f"{name}: expected a level in [0, 1], found {level!r}")
    try:
        if pattern is not None:
            Pattern.parse(pattern).tiling(tuple(shape), roles)
    except (ValueError, TypeError, AttributeError) as error:
        raise RecordError(f"{name}: its pattern {pattern!r}: {error}") from error
    return {
        "shape": tuple(shape),
        "roles": tuple(roles),
        "pattern": pattern,
        "level": level,
        "aliases": tuple(aliases),
        "lost_zeros": lost,
    }
