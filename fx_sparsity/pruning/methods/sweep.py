"""The column sweep of SparseGPT, stretch by stretch."""

from typing import NamedTuple

import torch
from torch import Tensor

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.masks.select import k_smallest_per_row
from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods import native

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
    weight: Tensor, root: Tensor, tiling: Tiling, level: float, budget: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Prune from left to right, updating what is still to come (arXiv 2301.00774, algorithm 1).

    Within a stretch of columns this is the published loop over U = R^-1, of which only the
    stretch's own corner is computed. The loop's update of all later columns is put off until it
    is their turn: with D = W - V, the change of all earlier ones, it adds D R U to a stretch.

    Args:
        weight: float32 [out, in]; not changed.
        root: upper triangular R with R R^T = H, float32 [in, in].
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
    kept, change = torch.empty_like(weight), torch.empty_like(weight)
    mask = torch.empty_like(weight, dtype=torch.bool)
    groups = Groups.of(tiling, width, level)
    extent = 1 if by_row(tiling, width) else tiling.extents[1]
    stretch = -(-block_size // extent) * extent
    for start in range(0, width, stretch):
        columns = slice(start, min(start + stretch, width))
        corner = root[columns, columns]
        eye = torch.eye(len(corner), device=root.device)
        inverse = torch.linalg.solve_triangular(corner, eye, upper=True)
        earlier = change[:, :start] @ root[:start, columns]
        part = torch.addmm(weight[:, columns], earlier, inverse)
        part_mask = torch.empty_like(part, dtype=torch.bool)
        if not groups.size:
            count = budget[..., start // extent : -(-columns.stop // extent)].sum(-1)
            scaled = part * corner.diagonal()
            part_mask = _choose(scaled, tiling, level, count, by_row(tiling, width))
        _sweep_columns(part, part_mask, inverse.contiguous(), groups)
        kept[:, columns], mask[:, columns] = part, part_mask
        torch.sub(weight[:, columns], part, out=change[:, columns])
    return mask, kept


def _choose(scaled: Tensor, tiling: Tiling, level: float, count: Tensor, rows: bool) -> Tensor:
    """The mask of one stretch, from w R_jj = w / U_jj: the square is what pruning w costs."""
    if rows:
        gone = k_smallest_per_row(scaled.abs(), count if count.dim() else int(count))
        return (~gone).contiguous()
    blocks = torch.Size(tiling.grid(scaled.shape)).numel()
    if tiling.zeros != "level" and blocks:
        level = int(count) / blocks
    return compute_mask(scaled, tiling, level, Rank.SQUARE)


def _sweep_columns(weight: Tensor, mask: Tensor, factor: Tensor, groups: Groups) -> None:
    """Sweep neighbouring columns in place; where there are groups `mask` is written, else read.

    Args:
        weight: float32 [out, columns].
        mask: boolean [out, columns].
        factor: the corner of U that belongs to these columns.
        groups: see `Groups`.
    """
    if native.covers(weight, mask, factor):
        torch.ops.fx_sparsity_pruning.sweep(weight, mask, factor, *groups)
        return
    columns, keep = weight.t().contiguous(), mask.t().contiguous()
    diagonal = factor.diagonal()
    for j, column in enumerate(columns):
        if groups.size and j % groups.size == 0:
            group = slice(j, min(j + groups.size, len(columns)))
            zeros = groups.zeros if group.stop - j == groups.size else groups.last
            scores = (columns[group] / diagonal[group, None]).square().t()
            keep[group] = ~k_smallest_per_row(scores, zeros).t()
        error = torch.where(keep[j], 0.0, column / diagonal[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
        column.masked_fill_(~keep[j], 0.0)
    weight.copy_(columns.t())
    mask.copy_(keep.t())
