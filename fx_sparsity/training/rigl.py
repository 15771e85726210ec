"""RigL: gradients say what grows. SEFT: and what goes."""

import math

import torch
from torch import Tensor

from fx_sparsity.sparsifier.mask import select_
from fx_sparsity.sparsifier.norm import Norm
from fx_sparsity.training.drop_and_grow import DropAndGrow


class RigL(DropAndGrow):
    """What is smallest goes, what has the largest gradient comes (arXiv 1911.11134, algorithm 1).

    The share that goes falls from `fraction` to 0 at `end` by a cosine (equation 1). Gradients of
    masked elements are computed for the steps alone after which masks move. The optimizer takes
    those steps, too, with the masked gradient; the paper leaves them out.

    Args:
        every: see `TrainingMethod`.
        begin: see `TrainingMethod`.
        end: T_end of the paper, about three quarters of all steps; None keeps the share as it is.
        fraction: alpha of the paper.
        norm: see `WeightNormSparsifier`.
    """

    through = True

    def __init__(
        self,
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        fraction: float = 0.3,
        norm: Norm = "L1",
    ) -> None:
        super().__init__(every, begin, end, fraction, norm)
        self._gradients: dict[str, Tensor] = {}

    def fraction_at(self, step: int) -> float:
        """See `DropAndGrow.fraction_at`."""
        if self.end is None:
            return self.fraction
        return self.fraction / 2 * (1 + math.cos(step * math.pi / self.end))

    def wants_gradients(self, step: int) -> bool:
        """See `TrainingMethod.wants_gradients`."""
        return step + 1 > self.begin and self.is_due(step + 1)

    def after_backward(self) -> None:
        """Take the gradients of all elements, and leave the optimizer those of what is kept."""
        if not self.wants_gradients(self.trained):
            return
        for name, gradient in self.gradients().items():
            self._gradients[name] = gradient.abs()
            select_(gradient, self.keep(name))

    def promise(self, name: str, weight: Tensor) -> Tensor:
        """See `DropAndGrow.promise`. A weight without a gradient gets back what went."""
        if name not in self._gradients:
            return torch.where(self.keep(name), weight.abs(), 0)
        return self._gradients[name]

    def step(self, use_path: bool = True) -> None:
        """See `DropAndGrow.step`. The gradients are let go."""
        super().step(use_path)
        self._gradients = {}


class SEFT(RigL):
    """RigL that drops by sensitivity, for fine-tuning a pruned model (arXiv 2505.24037).

    What has the least `|weight * gradient|` goes, and what has the largest gradient comes. The
    paper trains a sparse difference to the pruned model; here all that is kept is trained.

    Args:
        every: see `TrainingMethod`.
        begin: see `TrainingMethod`.
        end: see `RigL`.
        fraction: see `RigL`.
        norm: see `WeightNormSparsifier`.
    """

    def importance(self, name: str, weight: Tensor) -> Tensor:
        """See `DropAndGrow.importance`."""
        return torch.abs(weight * self._gradients.get(name, 1))
