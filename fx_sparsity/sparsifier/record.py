"""What masking leaves behind: which elements were pruned, and to what pattern."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.patterns import Pattern, Role, Tiling
from fx_sparsity.sparsifier.core import SparsifierCore, roles_of


@dataclass(frozen=True)
class MaskRecord:
    """One masked weight.

    Attributes:
        shape: of the weight.
        roles: of its axes.
        pattern: as `Pattern.parse` reads it; None for a method without one.
        level: share that was to go; None without a pattern.
        packed: the mask, one bit an element, row-major, low bit first; a set bit is kept.
        zeros: zeros among the *kept* elements when the record was made.
    """

    shape: tuple[int, ...]
    roles: tuple[Role, ...]
    pattern: str | None
    level: float | None
    packed: Tensor
    zeros: int

    @property
    def keep(self) -> Tensor:
        """The mask: boolean, of the weight's shape, True is kept."""
        return unpack_bits(self.packed, self.shape)

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
    def of(cls, sparsifier: SparsifierCore) -> "SparsityRecord":
        """Record every mask that `sparsifier` holds now, squashed or not."""
        weights = {}
        for name in sparsifier.names:
            config = sparsifier.config_of(name)
            mask = sparsifier.get_mask(name)
            keep = mask if mask.dtype == torch.bool else mask != 0
            weight = sparsifier.get_data(name, return_original=False)
            pattern = sparsifier.pattern_of(config)
            weights[name] = MaskRecord(
                shape=tuple(keep.shape),
                roles=roles_of(config, keep.ndim),
                pattern=None if pattern is None else str(pattern[0]),
                level=None if pattern is None else pattern[1],
                packed=pack_bits(keep),
                zeros=int(((weight == 0) & keep).sum()),
            )
        return cls(weights)

    def save(self, path: str | Path) -> None:
        """Write the record as one safetensors file: the masks, and the rest as JSON metadata."""
        meta: dict[str, dict[str, Any]] = {
            name: {
                "shape": w.shape,
                "roles": w.roles,
                "pattern": w.pattern,
                "level": w.level,
                "zeros": w.zeros,
            }
            for name, w in self.items()
        }
        masks = {name: w.packed.cpu() for name, w in self.items()}
        save_file(masks, path, metadata={"sparsity_record": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | Path) -> "SparsityRecord":
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no record.
        """
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("sparsity_record")
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
                        zeros=entry["zeros"],
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
