"""Elements chosen by bits, packed and unpacked: C++ operators, or plain torch with the same result.

Tensors here are integers as wide as the elements (see `as_integers`): exact, and for every dtype
there are kernels for those. Bits are packed as `masks.bits` packs them.
"""

import torch
from torch import Tensor

from fx_sparsity._native import STORAGE
from fx_sparsity.masks.bits import pack_bits, unpack_bits

CHUNK = 1 << 16
"""Elements that a thread takes at a time; `kWord * kWords` in `bits.h`."""

_PART = 1 << 20  # elements, where something is cast on the way
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(x: Tensor) -> Tensor:
    """The same bits as integers of the same size; contiguous. Complex dtypes have none."""
    return x.contiguous().view(_INTEGER[x.element_size()])


def count_bits(bits: Tensor) -> Tensor:
    """How many bits of a uint8 tensor are set before each `CHUNK` elements, and, last, in all."""
    chunks = -(-8 * len(bits) // CHUNK)
    counts = torch.zeros(chunks + 1, dtype=torch.int64)
    if STORAGE.ready():
        torch.ops.fx_sparsity_storage.count_bits(bits, counts)
    else:
        found = [int(unpack_bits(part, (8 * len(part),)).sum()) for part in bits.split(CHUNK // 8)]
        counts[1:] = torch.tensor(found, dtype=torch.int64).cumsum(0)
    return counts


def find_bits(x: Tensor) -> tuple[Tensor, int]:
    """A bit for every element of `x` that is not all zero bits, and how many there are."""
    if not STORAGE.ready():
        found = x != 0
        return pack_bits(found), int(found.count_nonzero())
    bits = torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    return bits, torch.ops.fx_sparsity_storage.find_bits(x, bits)


def pack(x: Tensor, bits: Tensor, values: Tensor) -> None:
    """Write the elements of `x` whose bit is set to `values`, one-dimensional, in order."""
    if STORAGE.ready():
        torch.ops.fx_sparsity_storage.pack(x, bits, values)
    else:
        values.copy_(x[unpack_bits(bits, x.shape)])


def unpack(bits: Tensor, counts: Tensor, values: Tensor, out: Tensor) -> None:
    """Undo `pack`, in place; what has no bit becomes zero. Values beyond the bits are ignored.

    Args:
        bits: as `pack` takes them.
        counts: what `count_bits` says of them.
        values: as `pack` wrote them.
        out: overwritten.
    """
    if STORAGE.ready():
        torch.ops.fx_sparsity_storage.unpack(bits, counts, values, out)
    else:
        out.zero_()[unpack_bits(bits, out.shape)] = values[: int(counts[-1])]


def count_of_fours(bits: Tensor) -> Tensor:
    """How many of every four bits are set: uint8, four bits to a count."""
    pairs = bits - ((bits >> 1) & 0x55)
    return (pairs & 0x33) + ((pairs >> 2) & 0x33)


def two_of_four(bits: Tensor, elements: int) -> bool:
    """Whether two of every four bits are set; `elements`, which four divides, are meant."""
    if STORAGE.ready():
        return torch.ops.fx_sparsity_storage.two_of_four(bits, elements)
    counts, whole = count_of_fours(bits), elements // 8
    return bool((counts[:whole] == 0x22).all() and (counts[whole:] == 2).all())


def gather_blocks(x: Tensor, bits: Tensor, blocks: Tensor) -> None:
    """Copy the blocks of a matrix whose bit is set to `blocks`, [n, height, width]."""
    if STORAGE.ready():
        torch.ops.fx_sparsity_storage.gather_blocks(x, bits, blocks)
    else:
        grid = _grid(x, blocks)
        blocks.copy_(grid[unpack_bits(bits, grid.shape[:2])])


def scatter_blocks(bits: Tensor, blocks: Tensor, out: Tensor) -> None:
    """Undo `gather_blocks`, in place; what belongs to no block becomes zero."""
    if STORAGE.ready():
        torch.ops.fx_sparsity_storage.scatter_blocks(bits, blocks, out)
    else:
        grid = _grid(out.zero_(), blocks)
        grid[unpack_bits(bits, grid.shape[:2])] = blocks


def keep_only(x: Tensor, keep: Tensor) -> int:
    """Clear the elements of `x` where `keep` is False, in place; returns how many are True.

    Args:
        x: one-dimensional.
        keep: boolean, of the same shape, contiguous.
    """
    if STORAGE.ready():
        return torch.ops.fx_sparsity_storage.keep_only(x, keep)
    for part, kept in zip(x.split(_PART), keep.split(_PART), strict=True):
        part.mul_(kept.view(torch.int8).to(part.dtype))  # times 0 or 1: exact
    return int(keep.count_nonzero())


def copy(x: Tensor, out: Tensor) -> None:
    """Write a contiguous CPU tensor to another one of its dtype and shape."""
    if STORAGE.ready():
        torch.ops.fx_sparsity_storage.copy(x, out)
    else:
        out.copy_(x)


def _grid(matrix: Tensor, blocks: Tensor) -> Tensor:
    """A matrix as [blocks down, blocks across, height, width], over the same memory."""
    height, width = blocks.shape[1:]
    return matrix.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
