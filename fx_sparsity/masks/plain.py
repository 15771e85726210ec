"""The mask engine in plain torch: every tiling, dtype and device, without host synchronisation."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.masks.blocks import (
    block_means,
    from_blocks,
    real_elements,
    to_blocks,
    zeros_of_whole,
)
from fx_sparsity.masks.rank import INFINITIES, Rank, ScoreError
from fx_sparsity.masks.select import k_smallest, k_smallest_per_row
from fx_sparsity.patterns import Tiling


def plain_mask(x: Tensor, tiling: Tiling, level: float, rank: Rank) -> Tensor:
    """The boolean mask of `x`, which is not empty and holds no NaN. See `compute_mask`."""
    grid = tiling.grid(x.shape)
    if math.prod(grid) == 0:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    covered = x
    if tiling.remainder == "dense":
        ends = [n * e for n, e in zip(grid, tiling.extents, strict=True)]
        covered = x[tuple(slice(end) for end in ends)]
    keep = ~_drop(covered, tiling, level, rank)
    if keep.shape != x.shape:
        missing = [whole - part for whole, part in zip(x.shape, keep.shape, strict=True)]
        keep = pad(keep, [n for m in reversed(missing) for n in (0, m)], value=True)
    return keep.contiguous()


def _drop(x: Tensor, tiling: Tiling, level: float, rank: Rank) -> Tensor:
    """Elements that go, shaped like `x`."""
    extents, shape = tiling.extents, x.shape
    if tiling.block_size == 1 and tiling.zeros == "all":
        return k_smallest(rank.scores(x).reshape(-1), round(level * x.numel())).view(shape)

    blocks = math.prod(tiling.grid(shape))
    count = tiling.chosen(level, blocks)
    chosen = None
    if tiling.zeros == "all" or count < blocks:
        means = block_means(x, extents, rank.terms)
        if rank is Rank.VALUE and bool(torch.isnan(means).any()):
            raise ScoreError(INFINITIES)
        chosen = k_smallest(means, count)
    if tiling.zeros == "all" and chosen is not None:
        return from_blocks(chosen.unsqueeze(1).expand(-1, tiling.block_size), shape, extents)

    # The filling of a ragged block is ranked last: the counts are of real elements.
    zeros: Tensor | int = zeros_of_whole(tiling, level)
    filling = None
    if any(size % extent for size, extent in zip(shape, extents, strict=True)):
        zeros = tiling.zeros_in_chosen(level, real_elements(shape, extents, x.device))
        filling = ~to_blocks(torch.ones_like(x, dtype=torch.bool), extents, fill=False)
    if chosen is not None:
        zeros = zeros * chosen
    scores = to_blocks(rank.scores(x), extents, fill=0.0)
    return from_blocks(k_smallest_per_row(scores, zeros, last=filling), shape, extents)
