"""ALPS: a mask by alternating directions, then the best values for it; as published and quick."""

import torch
from torch import Tensor

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.pruning.methods.admm import ADMMSparsifier
from fx_sparsity.pruning.methods.calibrated import Solution
from fx_sparsity.pruning.methods.exact_update import ExactUpdate
from fx_sparsity.pruning.methods.hessian import Hessian
from fx_sparsity.pruning.methods.matrix import GramSparsifier, Layer, Pipeline
from fx_sparsity.pruning.methods.where import select

_SMALL = 256  # inputs: as published, such a layer takes milliseconds
_ROWS = 512  # in one go: what is made along the way stays small
_RELAXATION = 1.3


class ALPS(Pipeline):
    """ALPS (arXiv 2406.07831): the mask of `ADMMSparsifier`, and `ExactUpdate` for it.

    Of the methods here the one with the least error of a layer, and what to choose where there is
    the time; with `Reconstruction`, of a model.

    Args:
        damping: added to the Gram matrix's diagonal, as a share of its mean.
    """

    def __init__(self, damping: float = 0.01) -> None:
        super().__init__(ADMMSparsifier(damping), ExactUpdate(damping))


class QuickALPSSparsifier(GramSparsifier):
    """What ALPS does (arXiv 2406.07831), in a tenth of its time, for any pattern.

    `ADMMSparsifier` starts at the dense weight, lets the penalty rho grow from 0.1 until the mask
    stands still, and inverts H + rho I each time that rho changes; least squares come after it.
    Here

    - rho stays, so that one inverse does; see `_penalty`;
    - D starts at what ranking w^2 H_jj keeps, and Y / rho at twice what that prunes;
    - the steps after V take 1.3 V - 0.3 D for it (over-relaxation, Boyd et al. 2011, section
      3.4.3), and end after a few iterations, whether or not V and D agree;
    - values come from a few steps of conjugate gradients (ALPS, algorithm 2);
    - products are in bfloat16 where the processor has it: only what they add to the weight is
      rounded. Elsewhere they are in float32, and take twice to three times as long.

    A layer of up to 256 inputs is solved as published. How far the error of others is above that of
    ALPS, and how long it takes: `python -m tests.benchmarks.bench_alps`; on layers of real language
    models it can be further above.

    Args:
        damping: added to the Gram matrix's diagonal, as a share of its mean.
        iterations: of alternating directions; more lower the error.
        steps: of conjugate gradients.

    Raises:
        ValueError: a number of iterations or steps is negative.
    """

    def __init__(self, damping: float = 0.01, iterations: int = 4, steps: int = 2) -> None:
        super().__init__(damping)
        for name, count in (("iterations", iterations), ("steps", steps)):
            if count < 0:
                raise ValueError(f"{name}: expected none or more, found {count!r}")
        self.iterations, self.steps = iterations, steps

    def solve_layer(self, layer: Layer, hessian: Hessian) -> Solution:
        """See `GramSparsifier.solve_layer`."""
        if layer.weight.shape[1] <= _SMALL:
            found = ADMMSparsifier(self.damping).solve_layer(layer, hessian)
            best = ExactUpdate(self.damping).refine_layer(layer, hessian, found)
            return best._replace(notes=(*found.notes, *best.notes))
        dtype = _quickest(layer.weight.device)
        scale = hessian.diagonal().sqrt()
        weight = layer.weight * scale
        matrix = hessian.matrix().div_(scale).div_(scale.unsqueeze(1))
        product = matrix.to(dtype, copy=True)
        mask, values = self._alternate(layer, weight, _pull(matrix).to(dtype))
        parts = (weight.split(_ROWS), values.split(_ROWS), mask.split(_ROWS))
        for dense, found_values, keep in zip(*parts, strict=True):
            _descend(dense, found_values, keep, product, self.steps)
        return Solution(mask, values.div_(scale), hessian.notes)

    def _alternate(self, layer: Layer, weight: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and D after all iterations; the weight is that of inputs of unit size."""
        mask = compute_mask(weight, layer.tiling, layer.level, Rank.SQUARE)
        free = 2 * weight - select(mask, weight)  # V + Y / rho, and where it is kept, D
        for _ in range(self.iterations):
            # V = W + (D - Y / rho - W) rho (H + rho I)^-1, where Y / rho = free - D.
            parts = (weight.split(_ROWS), free.split(_ROWS), mask.split(_ROWS))
            for dense, moving, keep in zip(*parts, strict=True):
                split = select(keep, moving)
                gap = dense - split
                pulled = split.sub_(moving).sub_(gap).to(pull.dtype) @ pull
                moving.add_(gap.add_(pulled), alpha=_RELAXATION)
            mask = compute_mask(free, layer.tiling, layer.level, Rank.SQUARE)
        return mask, select(mask, free)


def _pull(matrix: Tensor) -> Tensor:
    """The rho (H + rho I)^-1 of a scaled H, which is overwritten."""
    penalty = _penalty(matrix)
    matrix.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix)).mul_(penalty)


def _penalty(matrix: Tensor) -> Tensor:
    """A rho that suits four iterations: 0.3 and half the geometric mean of H's eigenvalues.

    What is best falls from 0.75 to 0.5 the more an input follows from the others, in layers of the
    benchmark and of SmolLM2-135M; the line was fitted to them. Every second input stands for all:
    the factor of a half matrix takes an eighth of the time.
    """
    half, failed = torch.linalg.cholesky_ex(matrix[::2, ::2])
    mean = half.diagonal().log().mean().mul(2).exp()
    return 0.3 + torch.where(failed == 0, mean, 0.0) / 2


def _descend(dense: Tensor, values: Tensor, keep: Tensor, matrix: Tensor, steps: int) -> None:
    """Conjugate gradients on kept values, in place; H has a unit diagonal, its preconditioner.

    Args:
        dense: W, float32 [rows, in].
        values: V, of that shape.
        keep: the mask, boolean.
        matrix: H, [in, in], in the dtype that products are taken in.
        steps: one product with H each, and one more.
    """
    residual = ((dense - values).to(matrix.dtype) @ matrix).float().mul_(keep)
    step, size = residual.clone(), torch.linalg.vecdot(residual, residual)
    for _ in range(steps):
        image = (step.to(matrix.dtype) @ matrix).float().mul_(keep)
        curvature = torch.linalg.vecdot(step, image)
        # Not positive where H is not positive definite, or all digits are used up.
        length = torch.where(curvature > 0, size / curvature, 0.0).unsqueeze(1)
        values.addcmul_(length, step)
        residual.addcmul_(length, image, value=-1)
        before, size = size, torch.linalg.vecdot(residual, residual)
        step.mul_(torch.where(before > 0, size / before, 0.0).unsqueeze(1)).add_(residual)


def _quickest(device: torch.device) -> torch.dtype:
    """In which products are fastest: the processor's bfloat16 counts only if it is no emulation.

    torch tells of instructions for it by a private function alone.
    """
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
    else:
        native = device.type == "cuda"
    return torch.bfloat16 if native else torch.float32
