"""From weights or scores to a mask: exact counts, deterministic ties, any number of dimensions."""

from dataclasses import replace

import torch
from torch import Tensor

from fx_sparsity.masks import native
from fx_sparsity.masks.plain import plain_mask
from fx_sparsity.masks.rank import NAN, Rank, ScoreError, any_nan, check_floating
from fx_sparsity.patterns import Tiling


@torch.no_grad()
def compute_mask(
    x: Tensor,
    tiling: Tiling,
    level: float,
    rank: Rank = Rank.VALUE,
    out: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """The mask that prunes the lowest ranks a tiling and a level allow.

    Exactly `round(level * blocks)` blocks are chosen (Python's `round`). Among equals, blocks and
    elements first in row-major order of the shape go first. A block's score is the mean of the
    elements that it really has, accumulated in float64; the C++ path compares the means to 20 bits.

    Args:
        x: scores, or the weight itself where `rank` is a norm; any shape, floating.
        tiling: the pattern in storage dimensions, one extent for each dimension of `x`.
        level: share of blocks that go, in [0, 1].
        rank: `VALUE` keeps high scores; `MAGNITUDE` and `SQUARE` rank weights without storing
            their norms.
        out: written to and returned: of the shape of `x`, boolean, or floating with 1 for kept.
        checked: `x` is known to hold no NaN (see `contains_nan`).

    Returns:
        `out`, or a contiguous boolean tensor of the shape of `x`: True is kept.

    Raises:
        ScoreError: `x` holds a NaN, a block both inf and -inf, or `x` is not floating; `out` is as
            it was.
        PatternError: the tiling does not fit the shape.
        ValueError: a level outside [0, 1], or `out` of another shape.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"a sparsity level lies in [0, 1], found {level!r}")
    check_floating(x)
    tiling.check(x.shape, tiling)
    if out is not None and out.shape != x.shape:
        raise ValueError(f"expected a mask of shape {tuple(x.shape)}, found {tuple(out.shape)}")
    if tiling.zeros == tiling.block_size:
        tiling = replace(tiling, zeros="all")
    if x.numel() and native.covers(x):
        mask = out
        if mask is None:
            mask = torch.empty(x.shape, dtype=torch.bool)
        if native.write_mask(x, tiling, level, rank, mask):
            return mask
    if not checked and contains_nan(x):
        raise ScoreError(NAN)
    keep = plain_mask(x, tiling, level, rank)
    return keep if out is None else out.copy_(keep)


def contains_nan(*tensors: Tensor) -> bool:
    """Whether one of `tensors` (floating) holds a NaN; waits for a device once, if at all."""
    flags = []
    for tensor in tensors:
        if native.covers(tensor):
            if native.has_nan(tensor):
                return True
        else:
            flags.append(any_nan(tensor))
    return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any()) if flags else False
