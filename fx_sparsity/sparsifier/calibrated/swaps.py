"""A better mask by exchanging single weights."""

import torch
from torch import Tensor

from fx_sparsity.patterns import Tiling
from fx_sparsity.sparsifier.calibrated import native
from fx_sparsity.sparsifier.calibrated.base import Solution
from fx_sparsity.sparsifier.calibrated.hessian import Hessian
from fx_sparsity.sparsifier.calibrated.matrix import Layer, Refinement

_NARROW = 32
"""Cells up to this width try every pair; in wider ones only the pruned weight that promises most
is tried, against every kept one."""
_LEAST = 1e-5  # share of its terms that an exchange must gain: less may be rounding


class Swaps(Refinement):
    """One kept weight goes, one pruned weight comes back, for as long as the error falls.

    As SparseSwaps (2025) does, and DSnoT (arXiv 2310.08915) before it, with exact costs from the
    Gram matrix; but starting from the values found so far, and giving the weight that comes back
    the value that is best for it. With G = (W - V) H, exchanging kept k for pruned j in a row
    changes its error by

        2 v_k G_k + v_k^2 H_kk - (G_j + v_k H_jk)^2 / H_jj.

    Weights are exchanged where that keeps the pattern: within an N:M group, within a row of the
    block where single weights go from blocks, within a row where the pattern is unstructured (which
    keeps each row's number of zeros). Whole blocks, rows and channels are left as they are, as the
    notes tell.

    Args:
        passes: over all groups of a row; the first finds most of what there is to find.
        damping: added to the Gram matrix's diagonal, as a share of its mean.
    """

    def __init__(self, passes: int = 3, damping: float = 0.01) -> None:
        super().__init__(damping)
        self.passes = passes

    def refine_layer(self, layer: Layer, hessian: Hessian, found: Solution) -> Solution:
        """See `Refinement.refine_layer`."""
        cell = _cell(layer.tiling, layer.weight.shape[1])
        if not cell:
            note = "weights go in whole blocks, so none are exchanged"
            return found._replace(notes=(note,))
        matrix, mask, values = (
            hessian.matrix().contiguous(),
            found.mask.clone(),
            found.weight.clone(),
        )
        gradient = (layer.weight - values) @ matrix
        if native.covers(matrix, mask, values):
            torch.ops.fx_sparsity_calibrated.swap(
                values, mask, gradient, matrix, cell, self.passes, _NARROW, _LEAST
            )
        else:
            _swap(values, mask, gradient, matrix, cell, self.passes)
        return Solution(mask, values)


def _cell(tiling: Tiling, width: int) -> int:
    """How many neighbours in a row may be exchanged; 0: none."""
    if tiling.zeros == "all":
        return width if tiling.block_size == 1 else 0
    return min(tiling.extents[1], width)


def _swap(
    values: Tensor, mask: Tensor, gradient: Tensor, matrix: Tensor, cell: int, passes: int
) -> None:
    """What the C++ operator does: exchange in place, rows side by side, cell after cell."""
    width = values.shape[1]
    for _ in range(passes):
        before = mask.clone()
        for start in range(0, width, cell):
            columns = slice(start, min(start + cell, width))
            for _ in range(1 if cell <= _NARROW else width):
                if not _swap_in_cell(values, mask, gradient, matrix, columns):
                    break
        if torch.equal(mask, before):
            break


def _swap_in_cell(
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
    possible = keep.unsqueeze(1) & ~keep.gather(1, back).unsqueeze(2) & (change < -_LEAST * worth)
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
