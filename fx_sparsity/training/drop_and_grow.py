"""Dynamic masks: at every update some of what is kept goes, and as much of the rest comes."""

from abc import abstractmethod

import torch
from torch import Tensor

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.patterns import Tiling
from fx_sparsity.sparsifier.norm import Norm
from fx_sparsity.training.method import TrainingMethod, at_least_float32
from fx_sparsity.training.optimizer_state import state_of_elements


class DropAndGrow(TrainingMethod):
    """Base class of SET, RigL and their like. The first masks keep what has the largest norm.

    At every later update a `fraction` of what is kept goes, lowest `importance` first, and the
    highest `promise` comes, until the counts are those of pattern and level again; what went may
    come right back. What was not kept before begins at zero, with the optimizer's state at zero.
    In N:M, single elements go, and in each group come as many as it lacks.

    Args:
        every: see `TrainingMethod`.
        begin: see `TrainingMethod`.
        end: see `TrainingMethod`.
        fraction: share of what is kept that goes at the first update.
        norm: see `WeightNormSparsifier`.

    Raises:
        ValueError: as `TrainingMethod`, and a fraction outside [0, 1].
    """

    def __init__(
        self,
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        fraction: float = 0.3,
        norm: Norm = "L1",
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"expected a fraction in [0, 1], found {fraction!r}")
        super().__init__(every, begin, end, norm)
        self.fraction = fraction

    def fraction_at(self, step: int) -> float:
        """Share of what is kept that goes at the update after `step` steps."""
        del step
        return self.fraction

    def importance(self, name: str, weight: Tensor) -> Tensor:
        """Not negative, of the weight's shape: what is kept and has the least goes."""
        del name
        return weight.abs()

    @abstractmethod
    def promise(self, name: str, weight: Tensor) -> Tensor:
        """Not negative, of the weight's shape: what has the most comes."""

    def choose(self, name: str, weight: Tensor, tiling: Tiling, level: float) -> Tensor:
        """See `TrainingMethod.choose`."""
        if self.trained == self.begin:
            return super().choose(name, weight, tiling, level)
        stay = self._stay(name, weight, tiling, level)
        promise = at_least_float32(self.promise(name, weight))
        promise = promise / promise.max().clamp(min=torch.finfo(promise.dtype).tiny)
        return compute_mask(torch.where(stay, 2, promise), tiling, level, Rank.VALUE)

    def _stay(self, name: str, weight: Tensor, tiling: Tiling, level: float) -> Tensor:
        """What is left after some went: whole blocks, or single elements where blocks stay."""
        if tiling.zeros != "all":
            level *= 1 if tiling.zeros == "level" else tiling.zeros / tiling.block_size
            tiling = Tiling((1,) * weight.ndim)
        share = level + self.fraction_at(self.trained) * (1 - level)
        kept = self.keep(name)
        scores = torch.where(kept, at_least_float32(self.importance(name, weight)), -1)
        return compute_mask(scores, tiling, share, Rank.VALUE) & kept

    def after_step(self) -> None:
        """See `TrainingMethod.after_step`.

        Raises:
            MaskError: at the first, for an optimizer whose state is not kept an element: a
                long time before it is reset.
        """
        super().after_step()
        if self.trained == 1:
            for name, weight in self.live().items():
                state_of_elements(self.optimizer, name, weight)

    def step(self, use_path: bool = True) -> None:
        """See `BaseSparsifier.step`. What grew begins at zero.

        Raises:
            MaskError: also for an optimizer whose state is not kept an element.
        """
        live = self.live()
        before = {name: self.keep(name).clone() for name in live}
        states = {name: state_of_elements(self.optimizer, name, w) for name, w in live.items()}
        super().step(use_path)
        if self.trained == self.begin:
            return
        with torch.no_grad():
            for name, weight in live.items():
                grown = self.keep(name) & ~before[name]
                for values in (weight, *states[name]):
                    values.masked_fill_(grown, 0)
