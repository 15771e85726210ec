"""Straight-through estimation: what is masked learns, too."""

from fx_sparsity.sparsifier.mask import selected
from fx_sparsity.sparsifier.norm import Norm
from fx_sparsity.training.method import TrainingMethod


class StraightThrough(TrainingMethod):
    """Every element learns from the gradient of the masked weight; SR-STE with a `decay`.

    `w <- w - lr * (g(mask * w) + decay * (1 - mask) * w)`, arXiv 2102.04010, equation 9, for any
    pattern: what is masked is drawn to zero, so that masks settle. The second term is part of the
    gradient, and goes through the optimizer like the rest of it. From `end` on masks are frozen,
    and what is masked learns no more.

    Args:
        every: see `TrainingMethod`; the paper computes masks at every step.
        begin: see `TrainingMethod`.
        end: see `TrainingMethod`.
        decay: lambda_W of the paper; 0 is the plain estimator.
        norm: see `WeightNormSparsifier`.

    Raises:
        ValueError: as `TrainingMethod`, and a decay below 0.
    """

    through = True
    returns = True

    def __init__(
        self,
        every: int = 1,
        begin: int = 0,
        end: int | None = None,
        decay: float = 2e-4,
        norm: Norm = "L1",
    ) -> None:
        if not decay >= 0:
            raise ValueError(f"expected a decay of 0 or more, found {decay!r}")
        super().__init__(every, begin, end, norm)
        self.decay = decay

    def wants_gradients(self, step: int) -> bool:
        """See `TrainingMethod.wants_gradients`."""
        return step >= self.begin and not self.is_frozen(step)

    def after_backward(self) -> None:
        """Add the decay of what is masked to its gradient."""
        if not self.decay or not self.wants_gradients(self.trained):
            return
        for name, gradient in self.gradients().items():
            masked = selected(self.get_tensor(name), ~self.keep(name))
            gradient.add_(masked, alpha=self.decay)
