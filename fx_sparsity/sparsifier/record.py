"""What masking leaves behind: which elements were pruned, and to what pattern."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.patterns import Pattern, Role, Tiling
from fx_sparsity.sparsifier.core import SparsifierCore, roles_of

ZEROS = "::zeros"
"""Behind a weight's name: the kept zeros, in a record's file."""
_METADATA = "sparsity_record"


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
        """Write the record as one safetensors file: the masks, and the rest as JSON metadata."""
        from safetensors.torch import save_file  # here, since it takes a while to import

        meta: dict[str, dict[str, Any]] = {
            name: {
                "shape": w.shape,
                "roles": w.roles,
                "pattern": w.pattern,
                "level": w.level,
                "aliases": w.aliases,
                "lost_zeros": w.lost_zeros,
            }
            for name, w in self.items()
        }
        masks = {name: w.packed.cpu() for name, w in self.items()}
        masks |= {f"{name}{ZEROS}": w.packed_zeros.cpu() for name, w in self.items()}
        save_file(masks, path, metadata=record_metadata(meta))

    @classmethod
    def load(cls, path: str | Path) -> "SparsityRecord":
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no record.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            if text is None:
                raise ValueError(f"{path} holds no sparsity record")
            return cls(
                {
                    name: MaskRecord(
                        shape=tuple(entry["shape"]),
                        roles=tuple(entry["roles"]),
                        pattern=entry["pattern"],
                        level=entry["level"],
                        packed=file.get_tensor(name),
                        packed_zeros=file.get_tensor(f"{name}{ZEROS}"),
                        aliases=tuple(entry["aliases"]),
                        lost_zeros=entry.get("lost_zeros", ""),
                    )
                    for name, entry in json.loads(text).items()
                }
            )

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
        weights: name -> shape, roles, pattern, level and aliases, as `MaskRecord` has them.
    """
    return {_METADATA: json.dumps(weights)}
