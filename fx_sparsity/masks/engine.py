"""From scores to a mask: exact counts, deterministic ties, any number of dimensions."""

import torch
from torch import Tensor

from fx_sparsity.masks.blocks import from_blocks, real_elements, to_blocks
from fx_sparsity.masks.select import k_smallest, k_smallest_per_row
from fx_sparsity.patterns import Tiling


class ScoreError(ValueError):
    """Scores that cannot be ranked: NaN, or not a floating dtype."""


@torch.no_grad()
def compute_mask(scores: Tensor, tiling: Tiling, level: float) -> Tensor:
    """The mask that prunes the lowest scores a tiling and a level allow.

    Exactly `round(level * blocks)` blocks are chosen (Python's `round`). Among equals, blocks and
    elements first in row-major storage order go first. A block's score is the mean of the elements
    that it really has, accumulated in float64.

    Args:
        scores: importance of every element, any shape, floating; higher is kept.
        tiling: the pattern in storage dimensions, one extent for each dimension of `scores`.
        level: share of blocks that go, in [0, 1].

    Returns:
        Contiguous boolean tensor of the shape of `scores`: True is kept.

    Raises:
        ScoreError: `scores` holds a NaN or is not floating.
        PatternError: the tiling does not fit the shape.
        ValueError: a level outside [0, 1].
    """
    if not 0 <= level <= 1:
        raise ValueError(f"a sparsity level lies in [0, 1], found {level!r}")
    if not scores.is_floating_point():
        raise ScoreError(f"scores must be floating, found {scores.dtype}")
    tiling.check(scores.shape, tiling)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if bool(torch.isnan(scores).any()):
        raise ScoreError("scores contain NaN")

    whole = scores
    if tiling.remainder == "dense":
        extent = [n * e for n, e in zip(tiling.grid(scores.shape), tiling.extents, strict=True)]
        scores = scores[tuple(slice(size) for size in extent)]
    if scores.numel() == 0:
        return torch.ones(whole.shape, dtype=torch.bool, device=whole.device)

    keep = ~_drop(scores, tiling, level)
    if keep.shape != whole.shape:
        missing = [w - k for w, k in zip(whole.shape, keep.shape, strict=True)]
        padding = [n for m in reversed(missing) for n in (0, m)]
        keep = torch.nn.functional.pad(keep, padding, value=True)
    return keep.contiguous()


def _drop(scores: Tensor, tiling: Tiling, level: float) -> Tensor:
    """Elements that go, shaped like `scores`."""
    extents, shape = tiling.extents, scores.shape
    if tiling.block_size == 1 and tiling.zeros == "all":
        return k_smallest(scores.reshape(-1), round(level * scores.numel())).view(shape)

    sizes = real_elements(shape, extents, scores.device)
    chosen = torch.ones(len(sizes), dtype=torch.bool, device=scores.device)
    if (count := tiling.chosen(level, len(sizes))) < len(sizes):
        means = to_blocks(scores, extents, fill=0.0).sum(1, dtype=torch.float64) / sizes
        if bool(torch.isnan(means).any()):
            raise ScoreError("a block's mean score is NaN: it holds both inf and -inf")
        chosen = k_smallest(means, count)
    if tiling.zeros == "all":
        return from_blocks(chosen.unsqueeze(1).expand(-1, tiling.block_size), shape, extents)

    # The filling of a ragged block is ranked last: the counts are of real elements.
    zeros = tiling.zeros_in_chosen(level, sizes) * chosen
    filling = None
    if bool((sizes < tiling.block_size).any()):
        filling = ~to_blocks(torch.ones_like(scores, dtype=torch.bool), extents, fill=False)
    blocks = to_blocks(scores, extents, fill=0.0)
    return from_blocks(k_smallest_per_row(blocks, zeros, last=filling), shape, extents)
