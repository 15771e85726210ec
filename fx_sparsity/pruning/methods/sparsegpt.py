"""SparseGPT: pruning column by column, each error made up for by the columns still to come."""

import torch
from torch import Tensor

from fx_sparsity.masks import compute_mask
from fx_sparsity.masks.blocks import to_blocks
from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods.calibrated import Solution
from fx_sparsity.pruning.methods.hessian import Hessian
from fx_sparsity.pruning.methods.matrix import GramSparsifier, Layer
from fx_sparsity.pruning.methods.sweep import Groups, by_row, sweep
from fx_sparsity.pruning.methods.where import select


class SparseGPTSparsifier(GramSparsifier):
    """SparseGPT (arXiv 2301.00774, algorithm 1): the mask, and the update that comes with it.

    Columns are swept from left to right. Pruning w in column j costs w^2 / U_jj^2, where
    U^T U = H^-1, and is made up for, as well as the columns right of j can, by subtracting
    w / U_jj * U_j from its row. What goes is settled stretch by stretch of `block_size` columns,
    at the costs that stand when the sweep gets there:

    - unstructured: the cheapest of the stretch, or of each of its rows, in proportion to its width;
    - N:M: the cheapest of each group, when the sweep gets to the group;
    - blocks and channels: the least mean cost, in proportion to the stretch's width;
    - rows: the least w H w^T, all at once, since nothing makes up for a row.

    Weights of inputs that are always zero go first; those that are kept stay as they are. The C++
    sweep is used where it can be compiled.

    Args:
        block_size: columns in a stretch; rounded up to whole blocks of the pattern.
        damping: added to the Gram matrix's diagonal, as a share of its mean. Raised, as the notes
            then tell, where the sum is not positive definite.
    """

    def __init__(self, block_size: int = 128, damping: float = 0.01) -> None:
        super().__init__(damping)
        if block_size < 1:
            raise ValueError(f"block_size: expected a positive number, found {block_size!r}")
        self.block_size = block_size

    def solve_layer(self, layer: Layer, hessian: Hessian) -> Solution:
        """See `GramSparsifier.solve_layer`."""
        weight, tiling, level = layer.weight, layer.tiling, layer.level
        if _spans_rows(tiling, weight.shape[1]):
            mask = compute_mask((weight @ hessian.matrix()) * weight, tiling, level)
            return Solution(mask, select(mask, weight), hessian.notes)
        order, budget = self.plan(layer, hessian)
        if order is not None:
            weight = weight.index_select(1, order)
        root, used = hessian.root(order)
        mask, kept = sweep(weight, root, tiling, level, budget, self.block_size)
        if order is not None:
            del root, weight
            back = order.argsort()
            mask, kept = mask.index_select(1, back), kept.index_select(1, back)
        return Solution(mask, kept, used.notes)

    def plan(self, layer: Layer, hessian: Hessian) -> tuple[Tensor | None, Tensor]:
        """In which order columns are swept, and how much goes from where.

        Returns:
            A permutation of the columns that keeps blocks together, int64 [in], or None for the
            order that they have; and the budget of the columns in that order, see `sweep`. Here
            that is as equal as can be.
        """
        rows, columns = layer.tiling.grid(layer.weight.shape)
        if by_row(layer.tiling, layer.weight.shape[1]):
            rows, columns = 1, layer.weight.shape[1]
        ends = (torch.arange(columns + 1, dtype=torch.float64) * rows * layer.level).round().long()
        return None, ends.diff()


class ReorderedSparseGPTSparsifier(SparseGPTSparsifier):
    """SparseGPT in a better order (after ROSE, arXiv 2603.05878): what costs most goes first.

    The later a column is swept, the fewer are left to make up for it. A mask by w^2 H_jj, the cost
    without any update, says beforehand what is likely to go; columns (groups and blocks are moved
    as a whole) are swept in descending order of what it costs there. ROSE reorders only within
    blocks of columns, and the blocks; here all columns are sorted, which is better for as long as
    each stretch gives what the mask beforehand takes from it, and not the same share.
    """

    def plan(self, layer: Layer, hessian: Hessian) -> tuple[Tensor | None, Tensor]:
        """See `SparseGPTSparsifier.plan`."""
        weight, tiling = layer.weight, layer.tiling
        width = weight.shape[1]
        costs = weight.square() * hessian.diagonal()
        gone = ~compute_mask(costs, tiling, layer.level)
        unit = 1 if by_row(tiling, width) else tiling.extents[1]
        whole = width // unit * unit
        losses = select(gone, costs)[:, :whole].sum(0).view(-1, unit).sum(1)
        first = losses.argsort(descending=True, stable=True)
        order = (first.unsqueeze(1) * unit + torch.arange(unit, device=weight.device)).flatten()
        order = torch.cat([order, torch.arange(whole, width, device=weight.device)])
        if Groups.of(tiling, width, layer.level).size:
            return order, order[:0]
        if by_row(tiling, width):
            return order, gone[:, order].long()
        grid = Tiling(tiling.extents, remainder="pad").grid(weight.shape)
        budget = to_blocks(gone, tiling.extents, fill=0).any(1).view(grid).sum(0)
        return order, torch.cat([budget[first], budget[len(first) :]])


def _spans_rows(tiling: Tiling, width: int) -> bool:
    return tiling.zeros == "all" and tiling.extents[1] >= width
