"""Masks as bits: eight elements a byte, row-major, lowest bit first."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.masks import native

_GATHER = sum(1 << shift for shift in range(7, 57, 7))
"""Times eight bytes of 0 or 1, read as one little-endian integer: byte i at bit 56 + i, and nothing
else there, for 8i - 7j lies in 0..7 only where i = j."""


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of any shape into a uint8 tensor of ceil(elements / 8) bytes."""
    flat = mask.reshape(-1)
    flat = pad(flat, (0, -len(flat) % 8)).contiguous().view(torch.uint8)
    if sys.byteorder == "little":
        eights = flat.view(torch.int64)
        return ((eights * _GATHER) >> 56).to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def pack_mask(mask: Tensor) -> Tensor | None:
    """Pack a mask of any dtype in which zero is dropped and one is kept; None for other values."""
    bits = torch.empty(-(-mask.numel() // 8), dtype=torch.uint8)
    plain = native.pack_mask(mask, bits)
    if plain is not None:
        return bits if plain else None
    keep = mask if mask.dtype == torch.bool else mask != 0
    same = keep is mask or torch.equal(keep.to(mask.dtype), mask)
    return pack_bits(keep) if same else None


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits`: a boolean tensor of `shape`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts) & 1
    return bits.view(-1)[: torch.Size(shape).numel()].view(tuple(shape)).bool()
