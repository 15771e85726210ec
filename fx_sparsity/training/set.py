"""SET: sparse evolutionary training."""

import torch
from torch import Tensor

from fx_sparsity.sparsifier.norm import Norm
from fx_sparsity.training.drop_and_grow import DropAndGrow

_PRIME = 1_000_003


class SET(DropAndGrow):
    """What is smallest goes, and as much comes at random (arXiv 1707.04780, algorithm 2).

    The paper draws the values of new weights; here they begin at zero, as in the comparison of
    arXiv 1911.11134. The draws depend on `seed`, the step and the weight's place alone, so that
    they are the same after resuming, and on every rank.

    Args:
        every: see `TrainingMethod`.
        begin: see `TrainingMethod`.
        end: see `TrainingMethod`.
        fraction: zeta of the paper.
        norm: see `WeightNormSparsifier`.
        seed: of the draws.
    """

    def __init__(
        self,
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        fraction: float = 0.3,
        norm: Norm = "L1",
        seed: int = 0,
    ) -> None:
        super().__init__(every, begin, end, fraction, norm)
        self.seed = seed

    def promise(self, name: str, weight: Tensor) -> Tensor:
        """See `DropAndGrow.promise`. A weight without a gradient gets back what went."""
        if weight.grad is None:
            return torch.where(self.keep(name), weight.abs(), 0)
        place = self.names.index(name)
        draw = (self.seed * _PRIME + self.trained) * _PRIME + place
        generator = torch.Generator().manual_seed(draw % (1 << 63))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
