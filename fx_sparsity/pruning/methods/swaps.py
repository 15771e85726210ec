"""A better mask by exchanging single weights, and refitting the others as it goes."""

import torch
from torch import Tensor

from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods import native
from fx_sparsity.pruning.methods.calibrated import Solution
from fx_sparsity.pruning.methods.hessian import Hessian
from fx_sparsity.pruning.methods.matrix import Layer, Refinement

_NARROW = 32
"""Cells up to this width try every pair; in wider ones only the pruned weight that promises most
is tried, against every kept one."""
_LEAST = 1e-5  # share of its terms that an exchange must gain: less may be rounding


class Swaps(Refinement):
    """One kept weight goes, one pruned weight comes back, wherever that lowers the error.

    As SparseSwaps (December 2025) does, and DSnoT (arXiv 2310.08915) before it, with exact costs
    from the Gram matrix. Other than there, values are not those of the dense weight: exchanges
    start from what was found so far, what comes back gets its best value, and between exchanges
    each kept weight moves to where it is best (coordinate descent). With G = (W - V) H,

    - exchanging kept k for pruned j changes a row's error by
      2 v_k G_k + v_k^2 H_kk - (G_j + v_k H_jk)^2 / H_jj, where j must be worth something;
    - moving kept j to where it is best adds G_j / H_jj to it.

    Columns are gone through in stretches, first from right to left, since SparseGPT has left to the
    last ones what they could not make up for, then back (a symmetric Gauss-Seidel iteration): what
    lies ahead of a stretch is as it was when G was last known there, and only what lies behind
    brings it up to date. The error never rises.

    Weights are exchanged where that keeps the pattern and what each row keeps: within an N:M group,
    within one row of a block that loses single weights, within one row of a stretch where the
    pattern is unstructured. Whole blocks, rows and channels are not, as the notes tell.

    Args:
        sweeps: over all columns; the first finds most of what there is to find.
        block_size: columns in a stretch; rounded up to whole groups.
        damping: added to the Gram matrix's diagonal, as a share of its mean.
    """

    def __init__(self, sweeps: int = 2, block_size: int = 128, damping: float = 0.01) -> None:
        super().__init__(damping)
        if block_size < 1:
            raise ValueError(f"block_size: expected a positive number, found {block_size!r}")
        self.sweeps, self.block_size = sweeps, block_size

    def refine_layer(self, layer: Layer, hessian: Hessian, found: Solution) -> Solution:
        """See `Refinement.refine_layer`."""
        cell = _cell(layer.tiling, layer.weight.shape[1], self.block_size)
        if not cell:
            note = "weights go in whole blocks, so none are exchanged"
            return found._replace(notes=(note,))
        matrix, mask, values = hessian.matrix(), found.mask.clone(), found.weight.clone()
        change, gradients = layer.weight - values, torch.empty_like(values)
        stretch = -(-self.block_size // cell) * cell
        starts = range(0, layer.weight.shape[1], stretch)
        before, begun = layer.weight, found.weight
        for sweep in range(self.sweeps):
            forth = sweep % 2 == 1
            for start in starts if forth else reversed(starts):
                columns = slice(start, start + stretch)
                if sweep == 0:
                    gradient = change @ matrix[:, columns]
                else:
                    behind = slice(start) if forth else slice(columns.stop, None)
                    gradient = torch.addmm(
                        gradients[:, columns], change[:, behind], matrix[behind, columns]
                    )
                part, keep = values[:, columns].contiguous(), mask[:, columns].contiguous()
                _exchange(part, keep, gradient, matrix[columns, columns].contiguous(), cell)
                values[:, columns], mask[:, columns] = part, keep
                gradients[:, columns] = gradient
                torch.sub(before[:, columns], part, out=change[:, columns])
            # A stretch has not seen yet what changed since the sweep before began its way there.
            before, begun = begun, values.clone() if sweep + 2 < self.sweeps else values
        return Solution(mask, values)


def _cell(tiling: Tiling, width: int, stretch: int) -> int:
    """How many neighbours in a row may be exchanged; 0: none."""
    if tiling.zeros == "all":
        return min(width, stretch) if tiling.block_size == 1 else 0
    extent = tiling.extents[1]
    return min(width, stretch) if extent == width > _NARROW else extent


def _exchange(values: Tensor, keep: Tensor, gradient: Tensor, matrix: Tensor, cell: int) -> None:
    """Exchange, then refit, cell by cell in a stretch of columns, in place.

    Args:
        values: float32 [out, columns]; zeros where `keep` is False.
        keep: boolean [out, columns].
        gradient: G, float32 [out, columns].
        matrix: the corner of H that belongs to the columns.
        cell: neighbours that may be exchanged for one another.
    """
    if native.covers(values, keep, gradient, matrix):
        torch.ops.fx_sparsity_pruning.exchange(
            values, keep, gradient, matrix, cell, _NARROW, _LEAST
        )
        return
    diagonal = matrix.diagonal()
    width = values.shape[1]
    for start in range(0, width, cell):
        columns = slice(start, min(start + cell, width))
        for _ in range(1 if columns.stop - start <= _NARROW else width):
            if not _exchange_one(values, keep, gradient, matrix, columns):
                break
        for j in range(columns.start, columns.stop):
            step = torch.where(keep[:, j], gradient[:, j] / diagonal[j], 0.0)
            values[:, j] += step
            gradient.addr_(step, matrix[j], alpha=-1)


def _exchange_one(
    values: Tensor, mask: Tensor, gradient: Tensor, matrix: Tensor, columns: slice
) -> bool:
    """The best exchange of each row within `columns`; whether there was any."""
    v, g, keep = values[:, columns], gradient[:, columns], mask[:, columns]
    corner = matrix[columns, columns]
    diagonal = corner.diagonal()
    count = v.shape[1] if v.shape[1] <= _NARROW else 1
    promise = torch.where(keep, -torch.inf, g.square() / diagonal)
    back = promise.topk(count, dim=1).indices
    worth = (g.gather(1, back).unsqueeze(2) + v.unsqueeze(1) * corner[back]).square()
    worth /= diagonal[back].unsqueeze(2)
    change = (2 * v * g + v.square() * diagonal).unsqueeze(1) - worth
    gains = (worth > 0) & (change < -_LEAST * worth)
    possible = keep.unsqueeze(1) & ~keep.gather(1, back).unsqueeze(2) & gains
    change = torch.where(possible, change, torch.inf).flatten(1)
    least, at = change.min(1)
    rows = (least < torch.inf).nonzero().squeeze(1)
    if not len(rows):
        return False
    k = at[rows] % v.shape[1]
    j = back[rows, at[rows] // v.shape[1]]
    gone = v[rows, k]
    value = (g[rows, j] + gone * corner[j, k]) / diagonal[j]
    k, j = k + columns.start, j + columns.start
    gradient[rows] += gone.unsqueeze(1) * matrix[k] - value.unsqueeze(1) * matrix[j]
    values[rows, k], values[rows, j] = 0.0, value
    mask[rows, k], mask[rows, j] = False, True
    return True
