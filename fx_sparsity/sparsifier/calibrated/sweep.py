"""The column sweep of SparseGPT, stretch by stretch."""

from typing import NamedTuple

import torch
from torch import Tensor

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.masks.select import k_smallest_per_row
from fx_sparsity.patterns import Tiling
from fx_sparsity.sparsifier.calibrated import native

_MOST_IN_GROUP = 32  # elements of an N:M group


class Groups(NamedTuple):
    """N:M groups, whose zeros are chosen when the sweep gets to them.

    Attributes:
        size: M; 0 where the mask is given instead.
        zeros: of a whole group.
        last: zeros of a ragged group at the end.
    """

    size: int = 0
    zeros: int = 0
    last: int = 0

    @staticmethod
    def of(tiling: Tiling, width: int, level: float) -> "Groups":
        """The groups that a tiling means, or none."""
        height, size = tiling.extents
        if tiling.zeros != "level" or height > 1 or size > _MOST_IN_GROUP:
            return Groups()
        real = torch.tensor([size, 0 if tiling.remainder == "dense" else width % size])
        zeros, last = tiling.zeros_in_chosen(level, real).tolist()
        return Groups(size, zeros, last)


def by_row(tiling: Tiling, width: int) -> bool:
    """Whether each row is ranked on its own and as a whole; a short one is an N:M group."""
    return tiling.zeros == "level" and tiling.extents == (1, width) and width > _MOST_IN_GROUP


def sweep(
    weight: Tensor, factor: Tensor, tiling: Tiling, level: float, budget: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Prune from left to right, updating what is still to come (arXiv 2301.00774, algorithm 1).

    Args:
        weight: float32 [out, in]; not changed.
        factor: upper triangular U with U^T U = H^-1, float32 [in, in].
        tiling: of [out, in].
        level: share of blocks that go.
        budget: int64; how many blocks each column of blocks gives, [columns of blocks], and where
            rows are ranked on their own how many elements each column gives, [in] or [out, in].
            Only its sums over a stretch count. N:M groups do without.
        block_size: columns in a stretch; rounded up to whole blocks.

    Returns:
        The mask, and the updated weight with zeros where it prunes.
    """
    width = weight.shape[1]
    kept, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    groups = Groups.of(tiling, width, level)
    extent = 1 if by_row(tiling, width) else tiling.extents[1]
    stretch = -(-block_size // extent) * extent
    for start in range(0, width, stretch):
        stop = min(start + stretch, width)
        if not groups.size:
            scaled = kept[:, start:stop] / factor.diagonal()[start:stop]
            count = budget[..., start // extent : -(-stop // extent)].sum(-1)
            mask[:, start:stop] = _choose(scaled, tiling, level, count, by_row(tiling, width))
        # A block may be far wider than what is best updated at a time.
        step = stretch if groups.size or stretch < 2 * block_size else block_size
        for first in range(start, stop, step):
            columns = slice(first, min(first + step, stop))
            part, part_mask = kept[:, columns].contiguous(), mask[:, columns].contiguous()
            errors = _sweep_columns(part, part_mask, factor[columns, columns].contiguous(), groups)
            kept[:, columns], mask[:, columns] = part, part_mask
            if columns.stop < width:
                kept[:, columns.stop :].addmm_(errors, factor[columns, columns.stop :], alpha=-1)
    return mask, kept


def _choose(scaled: Tensor, tiling: Tiling, level: float, count: Tensor, rows: bool) -> Tensor:
    """The mask of one stretch, from w / U_jj: the square is what pruning w costs."""
    if rows:
        return ~k_smallest_per_row(scaled.abs(), count if count.dim() else int(count))
    blocks = torch.Size(tiling.grid(scaled.shape)).numel()
    if tiling.zeros != "level" and blocks:
        level = int(count) / blocks
    return compute_mask(scaled, tiling, level, Rank.SQUARE)


def _sweep_columns(weight: Tensor, mask: Tensor, factor: Tensor, groups: Groups) -> Tensor:
    """Sweep neighbouring columns; `weight` is updated, and where groups are given `mask` written.

    Returns:
        w / U_jj of what was pruned, else 0; float32 [out, columns].
    """
    if native.covers(weight, mask, factor):
        errors = torch.zeros_like(weight)
        torch.ops.fx_sparsity_calibrated.sweep(weight, mask, factor, *groups, errors)
        return errors
    columns, keep = weight.t().contiguous(), mask.t().contiguous()
    errors = torch.zeros_like(columns)
    diagonal = factor.diagonal()
    for j, column in enumerate(columns):
        if groups.size and j % groups.size == 0:
            group = slice(j, min(j + groups.size, len(columns)))
            zeros = groups.zeros if group.stop - j == groups.size else groups.last
            scores = (columns[group] / diagonal[group, None]).square().t()
            keep[group] = ~k_smallest_per_row(scores, zeros).t()
        errors[j] = torch.where(keep[j], 0.0, column / diagonal[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        column.masked_fill_(~keep[j], 0.0)
    weight.copy_(columns.t())
    mask.copy_(keep.t())
    return errors.t().contiguous()
