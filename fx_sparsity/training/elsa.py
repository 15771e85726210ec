"""ADMM on the loss itself: for levels at which one look at the weights is not enough."""

import math
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.patterns import Tiling
from fx_sparsity.sparsifier import MaskError
from fx_sparsity.sparsifier.norm import Norm
from fx_sparsity.training.method import TrainingMethod, at_least_float32

_SPLIT, _DUAL = "split", "dual"


class ELSA(TrainingMethod):
    """ADMM on the true loss (arXiv 2510.01650): dense training that ends where it is sparse.

    Weights x are trained dense, z obeys pattern and level, and a dual y draws them together:

    - every step: the gradient of x gets `penalty * (x - z) + y`;
    - every `every` steps: z is what the pattern keeps of `x + y / penalty`, and then
      `y += penalty * (x - z)`.

    What is kept has the largest `v * (x + y / penalty) ** 2`, with v the second moment of an Adam
    (the paper's objective-aware projection), or 1 where the optimizer has none. `penalty` rises
    from `begin` to `end` by a cosine. At step `end` the masks are what is kept of x; before that
    they keep everything. Then the kept values are trained.

    Args:
        end: step at which the masks are computed.
        every: steps from one look at the pattern to the next.
        begin: step of the first one.
        penalty: lambda of the paper, at the end.
        norm: "L1" or "L2".

    Raises:
        ValueError: as `TrainingMethod`, and a penalty that is not positive.
    """

    dense_gradients = True

    def __init__(
        self,
        end: int,
        every: int = 32,
        begin: int = 0,
        penalty: float = 0.01,
        norm: Norm = "L1",
    ) -> None:
        if not penalty > 0:
            raise ValueError(f"expected a penalty above 0, found {penalty!r}")
        super().__init__(every, begin, end, norm)
        self.penalty = penalty

    def is_due(self, step: int) -> bool:
        """See `TrainingMethod.is_due`; at `end`, too."""
        return super().is_due(step) or step == self.end

    def updates(self, steps: int | None = None) -> int | None:
        """See `TrainingMethod.updates`; the last one is at `end`."""
        return len(range(self.begin, self.end or 0, self.every)) + 1

    def penalty_at(self, step: int) -> float:
        """The penalty of one step, 0 at `begin` and whole at `end`."""
        assert self.end is not None
        share = (min(step, self.end) - self.begin) / (self.end - self.begin)
        return self.penalty * (1 - math.cos(math.pi * max(share, 0))) / 2

    def after_backward(self) -> None:
        """Add the gradient of what draws x to z."""
        if self.is_frozen(self.trained):
            return
        penalty = self.penalty_at(self.trained)
        for name, gradient in self.gradients().items():
            split, dual = self.recall(name, _SPLIT), self.recall(name, _DUAL)
            if split is not None and dual is not None:
                gradient.add_(self.get_tensor(name), alpha=penalty)
                gradient.add_(split, alpha=-penalty).add_(dual)

    def step(self, use_path: bool = True) -> None:
        """Look at the pattern: z and y before `end`, then the masks. See `BaseSparsifier.step`."""
        if self.is_frozen(self.trained):
            super().step(use_path)
            for name in self.live():
                self.state[name].counters = {}
            return
        with torch.no_grad():
            self.check_updates(list(self.live()))
            found = {name: self._split(name, weight) for name, weight in self.live().items()}
        for name, (split, dual) in found.items():
            self.state[name].counters = {_SPLIT: split, _DUAL: dual}
        self.steps += 1

    def choose(self, name: str, weight: Tensor, tiling: Tiling, level: float) -> Tensor:
        """See `TrainingMethod.choose`."""
        moment = self._second_moment(name)
        if moment is None:
            return super().choose(name, weight, tiling, level)
        scores = at_least_float32(moment) * at_least_float32(weight).square()
        return compute_mask(scores, tiling, level, Rank.VALUE)

    def squash_mask(self, *args: Any, **kwargs: Any) -> None:
        """See `BaseSparsifier.squash_mask`.

        Raises:
            MaskError: also before step `end`, when everything is kept.
        """
        if not self.is_frozen(self.trained):
            raise MaskError(
                f"{type(self).__name__} computes masks at step {self.end}, and {self.trained} are "
                "trained; go on, or choose an earlier end"
            )
        super().squash_mask(*args, **kwargs)

    def _split(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The next z and y of one weight."""
        weight, penalty = weight.detach(), self.penalty_at(self.trained)
        dual = self.recall(name, _DUAL)
        if dual is None:
            dual = torch.zeros_like(weight)
        drawn = weight + dual / penalty if penalty else weight
        split = torch.where(self.choose(name, drawn, *self.asks(name)), drawn, 0)
        return split, dual + penalty * (weight - split)

    def _second_moment(self, name: str) -> Tensor | None:
        """What Adam knows of a weight's squared gradients, if the optimizer is one."""
        state = (
            {} if self.optimizer is None else self.optimizer.state.get(self.get_tensor(name), {})
        )
        return state.get("exp_avg_sq")
