"""Masks as bits: eight elements a byte, row-major, lowest bit first."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of any shape into a uint8 tensor of ceil(elements / 8) bytes."""
    flat = mask.reshape(-1)
    flat = pad(flat, (0, -len(flat) % 8)).view(-1, 8).to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits`: a boolean tensor of `shape`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts) & 1
    return bits.view(-1)[: torch.Size(shape).numel()].view(tuple(shape)).bool()
