"""The error of a layer's outputs and the model's own loss, as one error for any method."""

import torch
from torch import Tensor

from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods.calibrated import CalibratedSparsifier, Solution
from fx_sparsity.pruning.methods.groups import required
from fx_sparsity.pruning.methods.statistics import Statistic, Statistics

_INPUTS: frozenset[Statistic] = frozenset({"gram", "input_norm"})


class Moonshot(CalibratedSparsifier):
    """Another method, by a mix of a layer's error and the loss (after MOONSHOT, arXiv 2604.13287).

        Moonshot(SparseGPTSparsifier())

    The paper adds to the Hessian H of the layer's error, for each row of the weight, that of the
    loss: the empirical Fisher matrix of the row, of low rank. Here only its diagonal is known, the
    squares of the gradients that `FisherSparsifier` ranks by. They are noisy: what is used of them
    is F_ij = r_i k_j / sum(r), from their sums over rows r and over columns k, which is all there
    is where an input and the gradient of an output are independent (Adafactor, arXiv 1804.04235,
    section 3, does so, too). Inputs go together as they do in H, so that row i loses

        (w - v) S_i H S_i (w - v)^T, with S_ij^2 = 1 - share + share * c * F_ij / H_jj,

    whose curvature along w_ij is (1 - share) H_jj + share * c * F_ij; c gives both terms one mean
    over the weight. Since that is the error of W * S, elementwise, in place of W, any method that
    goes by the error of the outputs solves it as it is, with all of its steps and patterns.

    The squares are of sums over a batch, in which what differs from sequence to sequence cancels:
    calibrate with batches of one sequence or image.

    Args:
        method: goes by norms of inputs or by their Gram matrix.
        share: of the loss, in [0, 1).

    Raises:
        ValueError: the method looks at no inputs, or rounds, or the share is out of range.
    """

    def __init__(self, method: CalibratedSparsifier, share: float = 0.5) -> None:
        super().__init__()
        if not method.needs & _INPUTS:
            raise ValueError(
                "method: expected one that goes by the error of a layer's outputs, such as "
                f"WandaSparsifier or SparseGPTSparsifier, found {type(method).__name__}, which "
                "looks at no inputs"
            )
        if method.grid is not None:
            raise ValueError(
                f"method: {type(method).__name__} rounds to a grid, which scaling would leave; put "
                "Rounding behind it: Pipeline(Moonshot(...), Rounding())"
            )
        if not 0 <= share < 1:
            raise ValueError(f"share: expected a number from 0 to below 1, found {share!r}")
        self.method, self.share = method, share
        self.needs = method.needs | {"gradient_norm"}
        self.sequential = method.sequential

    def solve(self, weight: Tensor, stats: Statistics, tiling: Tiling, level: float) -> Solution:
        """See `CalibratedSparsifier.solve`."""
        fisher = required(stats, "gradient_squares")
        if not bool(fisher.any()):
            found = self.method.solve(weight, stats, tiling, level)
            note = "no gradient reached it, so only the error of its outputs counts"
            return found._replace(notes=(*found.notes, note))
        scale = _scale(fisher, _squares(stats), self.share)
        scaled = weight * scale
        found = self.method.solve(scaled, stats, tiling, level)
        # What a method leaves as it is stays so to the last digit.
        kept = torch.where(found.weight == scaled, weight, found.weight / scale)
        return found._replace(weight=kept)


def _squares(stats: Statistics) -> Tensor:
    """The diagonal of H without damping, [groups, 1, in]."""
    if stats.gram is not None:
        return stats.gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
    return required(stats, "squares").unsqueeze(1)


def _scale(fisher: Tensor, squares: Tensor, share: float) -> Tensor:
    """S, [groups, out, in]; inputs that are always zero have no curvature to share."""
    rows, columns = fisher.mean(2, keepdim=True), fisher.mean(1, keepdim=True)
    whole = rows.mean(1, keepdim=True).clamp(min=torch.finfo(fisher.dtype).tiny)
    relative = columns / whole * (squares.mean() / fisher.mean()) / squares
    return (share * rows * torch.where(squares > 0, relative, 0.0)).add_(1 - share).sqrt_()
