"""The mask by alternating directions: values that fit, and values that obey the pattern, agree."""

import torch
from torch import Tensor

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.pruning.methods.calibrated import Solution
from fx_sparsity.pruning.methods.hessian import Hessian
from fx_sparsity.pruning.methods.matrix import GramSparsifier, Layer

_START = 0.1
_EVERY = 3  # iterations between looks at the mask
_FASTER = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Share of the zeros that moved since the last look, and what the penalty is then multiplied by."""


class ADMMSparsifier(GramSparsifier):
    """The mask and values of ALPS (arXiv 2406.07831, algorithm 1), for any pattern.

    With inputs scaled so that H has a unit diagonal, three steps alternate: V minimises the error
    plus rho/2 ||V - D + Y/rho||^2; D is V + Y/rho with everything but the largest, by the pattern,
    set to zero; Y adds up rho (V - D). The penalty rho starts at 0.1 and grows the faster the more
    the mask still changes; when it does not, D is the solution. `ExactUpdate` completes it.

    Args:
        damping: added to the Gram matrix's diagonal, as a share of its mean.
        iterations: at most; the notes tell if the mask still changes by then.
    """

    def __init__(self, damping: float = 0.01, iterations: int = 300) -> None:
        super().__init__(damping)
        self.iterations = iterations

    def solve_layer(self, layer: Layer, hessian: Hessian) -> Solution:
        """See `GramSparsifier.solve_layer`."""
        matrix = hessian.matrix()
        scale = matrix.diagonal().sqrt()
        matrix /= scale.outer(scale)
        weight = layer.weight * scale
        target = weight @ matrix
        split, dual = weight, torch.zeros_like(weight)
        rho, inverse = _START, _inverse(matrix, _START)
        seen = torch.ones_like(weight, dtype=torch.bool)
        for iteration in range(1, self.iterations + 1):
            fitting = (target + rho * split - dual) @ inverse
            free = fitting + dual / rho
            mask = compute_mask(free, layer.tiling, layer.level, Rank.SQUARE)
            split = torch.where(mask, free, 0.0)
            dual = dual + rho * (fitting - split)
            if iteration % _EVERY:
                continue
            moved = int((mask != seen).sum())
            if not moved:
                return Solution(mask, split / scale, hessian.notes)
            share = moved / max(1, int((~mask).sum()))
            rho *= next(factor for least, factor in _FASTER if share >= least)
            seen, inverse = mask, _inverse(matrix, rho)
        note = f"the mask still changes after {self.iterations} iterations"
        return Solution(mask, split / scale, (*hessian.notes, note))


def _inverse(matrix: Tensor, rho: float) -> Tensor:
    """Of matrix + rho * I."""
    lifted = matrix.clone()
    lifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(lifted))
