"""Grids of values that codes stand for: symmetric, so that zero is one of them."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

GRID = "grid"
"""Key in a sparsifier's state of a weight that has been rounded, see `Grid.to_state`."""
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Grid:
    """Integer codes with one scale for a group of neighbours along `in`: value = code * scale.

    Attributes:
        bits: of a code, 2 to 8: from -2^(bits - 1) to 2^(bits - 1) - 1.
        group_size: inputs that share a scale; None where all inputs of an output do. What is left
            over at the end of a row is a group of its own.
        scale_dtype: that scales are rounded to. torchao's `Intx` tensors of bfloat16 weights have
            scales in bfloat16.

    Raises:
        ValueError: another number of bits, a group of nothing, or another dtype.
    """

    bits: int
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, found {self.bits!r}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size: expected a positive number, or None for all inputs of an output, "
                f"found {self.group_size!r}"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype: expected one of {', '.join(map(str, SCALE_DTYPES))}, "
                f"found {self.scale_dtype}"
            )

    def size(self, width: int) -> int:
        """Inputs that share a scale, of `width`."""
        return max(1, width if self.group_size is None else min(self.group_size, width))

    def spread(self, scales: Tensor, width: int) -> Tensor:
        """The scale of each element.

        Args:
            scales: [..., groups].
            width: of a row.

        Returns:
            [..., width].
        """
        return scales.repeat_interleave(self.size(width), -1)[..., :width]

    def nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        """The codes next to some values, ties to even, as torchao rounds; in the values' dtype.

        Also as torchao, values are multiplied by the reciprocal: the largest of a group may lie
        between two codes, where the last bit of a quotient decides.

        Args:
            values: floating.
            scale: of each, broadcastable.
        """
        most = 2 ** (self.bits - 1)
        return (values * (1 / scale)).round_().clamp_(-most, most - 1)

    def codes(self, values: Tensor, scales: Tensor) -> Tensor | None:
        """The codes that values stand for, if each value is its code times its scale, bit for bit.

        Args:
            values: [..., width], of any floating dtype, which products are rounded to.
            scales: [..., groups].

        Returns:
            int8, of the values' shape; None where a value is on no code.
        """
        scale = self.spread(scales, values.shape[-1]).float()
        codes = self.nearest(values.float(), scale)
        same = torch.equal((codes * scale).to(values.dtype), values)
        return codes.to(torch.int8) if same else None

    def to_state(self, scales: Tensor) -> dict[str, Any]:
        """What a sparsifier keeps of a rounded weight: plain values, and the scales."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
            "scales": scales,
        }

    @classmethod
    def from_state(cls, kept: dict[str, Any]) -> tuple[Self, Tensor]:
        """The grid and the scales of what `to_state` made."""
        dtype = getattr(torch, kept["scale_dtype"])
        return cls(kept["bits"], kept["group_size"], dtype), kept["scales"]
