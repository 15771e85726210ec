"""The mask by alternating directions: values that fit, and values that obey the pattern, agree."""

import torch
from torch import Tensor

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.pruning.methods.calibrated import Solution
from fx_sparsity.pruning.methods.exact_update import ExactUpdate
from fx_sparsity.pruning.methods.hessian import Hessian
from fx_sparsity.pruning.methods.matrix import GramSparsifier, Layer, Pipeline
from fx_sparsity.pruning.methods.where import select

_ROWS = 512  # in one go: what is made along the way stays small


class ADMMSparsifier(GramSparsifier):
    """The mask of ALPS (arXiv 2406.07831, algorithm 1) after few iterations, for any pattern.

    With inputs scaled so that H has a unit diagonal, three steps alternate (there, eq. 4): V
    minimises the error plus rho/2 ||V - D + U||^2; D is V + U with everything but the largest, by
    the pattern, set to zero; U, the dual variable over rho, grows by V - D.

    ALPS starts at the dense weight, lets rho grow from 0.1 until the mask stands still, and inverts
    H + rho I each time that rho changes. Here

    - rho stays, so that one inverse does;
    - D starts at what ranking w^2 H_jj keeps, where its first iteration gets, too, and U at twice
      what that prunes, which saves an iteration;
    - the steps after V take relaxation * V + (1 - relaxation) * D for it (over-relaxation, Boyd et
      al. 2011, section 3.4.3);
    - it ends after a number of iterations, whether or not V and D agree: what matters is the mask,
      and `ExactUpdate` finds better values for it. `ALPSSparsifier` is both;
    - products are in bfloat16 where that is faster: only what they add to the weight is rounded.

    On the layers of `tests/benchmarks/bench_oneshot.py` (size 1024) the error after an exact update
    was at most a tenth above that of ALPS with these defaults; more iterations lower it.

    Args:
        damping: added to the Gram matrix's diagonal, as a share of its mean.
        iterations: one product of the weight's size with H's each.
        rho: what V and D that differ cost. Less finds a better mask, in more iterations.
        relaxation: from 1, none, to below 2.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        damping: float = 0.01,
        iterations: int = 6,
        rho: float = 0.75,
        relaxation: float = 1.5,
    ) -> None:
        super().__init__(damping)
        if iterations < 0:
            raise ValueError(f"iterations: expected none or more, found {iterations!r}")
        if not rho > 0:
            raise ValueError(f"rho: expected a positive number, found {rho!r}")
        if not 1 <= relaxation < 2:
            raise ValueError(f"relaxation: expected 1 to below 2, found {relaxation!r}")
        self.iterations, self.rho, self.relaxation = iterations, rho, relaxation

    def solve_layer(self, layer: Layer, hessian: Hessian) -> Solution:
        """See `GramSparsifier.solve_layer`."""
        scale = hessian.diagonal().sqrt()
        weight = layer.weight * scale
        dtype = _quickest(weight.device)
        pull = self._pull(hessian, scale).to(dtype)
        mask = compute_mask(weight, layer.tiling, layer.level, Rank.SQUARE)
        free = 2 * weight - select(mask, weight)  # V + U, and where it is kept, D
        for _ in range(self.iterations):
            # V = W + (D - U - W) rho (H + rho I)^-1, where U = free - D.
            parts = (weight.split(_ROWS), free.split(_ROWS), mask.split(_ROWS))
            for dense, moving, keep in zip(*parts, strict=True):
                split = select(keep, moving)
                gap = dense - split
                pulled = torch.sub(split, moving).sub_(gap).to(dtype) @ pull
                moving.add_(gap.add_(pulled), alpha=self.relaxation)
            mask = compute_mask(free, layer.tiling, layer.level, Rank.SQUARE)
        return Solution(mask, select(mask, free).div_(scale), hessian.notes)

    def _pull(self, hessian: Hessian, scale: Tensor) -> Tensor:
        """The rho (H + rho I)^-1 of the scaled H, float32 [in, in]."""
        matrix = hessian.matrix().div_(scale).div_(scale.unsqueeze(1))
        matrix.diagonal().add_(self.rho)
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix)).mul_(self.rho)


class ALPSSparsifier(Pipeline):
    """ALPS (arXiv 2406.07831): a mask by alternating directions, then the best values for it.

    `Pipeline(ADMMSparsifier(), ExactUpdate())`. Where the mask departs from the paper is told at
    `ADMMSparsifier`; `ExactUpdate` runs the conjugate gradients of its algorithm 2, here
    until every row is solved well enough.

    Args:
        damping: added to the Gram matrix's diagonal, as a share of its mean.
        iterations: of alternating directions.
        tolerance: of `ExactUpdate`.
    """

    def __init__(self, damping: float = 0.01, iterations: int = 6, tolerance: float = 0.1) -> None:
        super().__init__(ADMMSparsifier(damping, iterations), ExactUpdate(damping, tolerance))


def _quickest(device: torch.device) -> torch.dtype:
    """In which products are fastest. The processor's bfloat16 counts only if it is no emulation."""
    native = device.type == "cuda" or (
        device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if native else torch.float32
