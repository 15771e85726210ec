"""Cutting an N-dimensional tensor into blocks, and putting it together again."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.patterns import Tiling

_SLAB = 1 << 20  # elements


def to_blocks(x: Tensor, extents: Sequence[int], fill: float) -> Tensor:
    """Cut `x` into blocks: [blocks, elements of a block], both in row-major storage order.

    Ragged edges are filled up with `fill`.
    """
    missing = [(-size) % extent for size, extent in zip(x.shape, extents, strict=True)]
    if any(missing):
        x = pad(x, [n for m in reversed(missing) for n in (0, m)], value=fill)
    split = [n for size, extent in zip(x.shape, extents, strict=True) for n in (-1, extent)]
    grid = [size // extent for size, extent in zip(x.shape, extents, strict=True)]
    split[::2] = grid
    dims = range(len(grid))
    x = x.reshape(split).permute([2 * d for d in dims] + [2 * d + 1 for d in dims])
    return x.reshape(math.prod(grid), math.prod(extents))


def block_means(x: Tensor, extents: Sequence[int], terms: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of `terms(x)` over the elements that each block really has: float64 tensor [blocks].

    The terms are computed slab by slab, so that they are never all in memory.
    """
    row = max(1, x[:1].numel()) * extents[0]
    slabs = x.split(extents[0] * max(1, _SLAB // row)) if x.dim() else [x]
    sums = [to_blocks(terms(slab), extents, fill=0.0).sum(1) for slab in slabs]
    return torch.cat(sums) / real_elements(x.shape, extents, x.device)


def from_blocks(blocks: Tensor, shape: Sequence[int], extents: Sequence[int]) -> Tensor:
    """Undo `to_blocks`: a contiguous tensor of `shape`, the filling cut off."""
    grid = [-(-size // extent) for size, extent in zip(shape, extents, strict=True)]
    order = [n for d in range(len(grid)) for n in (d, len(grid) + d)]
    whole = [n * e for n, e in zip(grid, extents, strict=True)]
    x = blocks.reshape([*grid, *extents]).permute(order).reshape(whole)
    return x[tuple(slice(size) for size in shape)].contiguous()


def real_elements(shape: Sequence[int], extents: Sequence[int], device: torch.device) -> Tensor:
    """How many elements of each block lie inside `shape`: int64 tensor [blocks]."""
    counts = torch.ones((), dtype=torch.int64, device=device)
    for size, extent in zip(shape, extents, strict=True):
        starts = torch.arange(0, size, extent, device=device)
        counts = counts.unsqueeze(-1) * (size - starts).clamp(max=extent)
    return counts.reshape(-1)


def zeros_of_whole(tiling: Tiling, level: float) -> int:
    """Zeros that a chosen block has if it lies wholly inside the weight."""
    return int(tiling.zeros_in_chosen(level, torch.tensor(tiling.block_size)))
