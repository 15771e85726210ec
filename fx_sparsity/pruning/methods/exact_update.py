"""The best values of kept weights, once the mask stands."""

import torch
from torch import Tensor

from fx_sparsity.pruning.methods.calibrated import Solution
from fx_sparsity.pruning.methods.hessian import Hessian
from fx_sparsity.pruning.methods.matrix import Layer, Refinement


class ExactUpdate(Refinement):
    """Least squares over the kept weights of each row (as OPTIMA does, arXiv 2512.13886).

    Each row v with its kept columns K solves H_KK v_K = (H w)_K. The rows' problems share one H, so
    that conjugate gradients, preconditioned by H's diagonal, run on all of them at once: one
    product with H a step. They start from the values found so far, and never raise the error.

    Args:
        damping: added to the Gram matrix's diagonal, as a share of its mean.
        tolerance: a row is solved when its residual r fulfils
            sqrt(sum r_j^2 / H_jj) <= tolerance * sqrt(sum w_j^2 H_jj). 0.01 is enough for an error
            within 1% of the least.
        iterations: at most. The notes tell of rows that are not solved by then, or cannot be
            because H is not positive definite: raise the damping.
    """

    def __init__(
        self, damping: float = 0.01, tolerance: float = 1e-2, iterations: int = 500
    ) -> None:
        super().__init__(damping)
        self.tolerance, self.iterations = tolerance, iterations

    def refine_layer(self, layer: Layer, hessian: Hessian, found: Solution) -> Solution:
        """See `Refinement.refine_layer`."""
        matrix, keep = hessian.matrix(), found.mask
        scale = matrix.diagonal()
        values = found.weight.clone()
        residual = (layer.weight - values) @ matrix
        residual.mul_(keep)
        enough = (layer.weight.square() @ scale) * self.tolerance**2
        step = residual / scale
        size, image = _dots(residual, step), torch.empty_like(step)
        open_rows = size > enough
        for _ in range(self.iterations):
            if not bool(open_rows.any()):
                break
            torch.mm(step, matrix, out=image).mul_(keep)
            curvature = _dots(step, image)
            open_rows &= curvature > 0  # H is not positive definite, or all digits are used up
            length = torch.where(open_rows, size / curvature, 0.0).unsqueeze(1)
            values.addcmul_(length, step)
            residual.addcmul_(length, image, value=-1)
            previous, scaled = size, torch.div(residual, scale, out=image)
            size = _dots(residual, scaled)
            open_rows &= size > enough
            step.mul_(torch.where(open_rows, size / previous, 0.0).unsqueeze(1)).add_(scaled)
        unsolved = int((size > enough).sum())
        note = f"{unsolved} rows are not solved to {self.tolerance:g}, see ExactUpdate"
        return Solution(keep, values, (note,) if unsolved else ())


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products of rows: [rows]."""
    return torch.linalg.vecdot(a, b)
