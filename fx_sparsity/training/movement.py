"""Movement pruning: what moves away from zero stays."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.masks.blocks import block_means, from_blocks
from fx_sparsity.patterns import PatternError, Tiling
from fx_sparsity.sparsifier.core import roles_of
from fx_sparsity.sparsifier.mask import select_
from fx_sparsity.training.method import TrainingMethod

_SCORES = "scores"


class Movement(TrainingMethod):
    """Hard movement pruning (arXiv 2005.07683): keeps the highest scores, at any level and pattern.

    Scores gather `-gradient * weight` of every element, masked or not, from `begin` on: with plain
    gradient descent on the scores, as in equation 3, its learning rate changes no order. The
    weights themselves get the masked gradient. Before there are scores, the norm decides.

    Args:
        every: see `TrainingMethod`.
        begin: see `TrainingMethod`.
        end: see `TrainingMethod`.
        norm: see `WeightNormSparsifier`.
    """

    through = True
    returns = True

    def wants_gradients(self, step: int) -> bool:
        """See `TrainingMethod.wants_gradients`."""
        return step >= self.begin and not self.is_frozen(step)

    def after_backward(self) -> None:
        """Add to the scores, and leave the optimizer the gradients of what is kept."""
        if not self.wants_gradients(self.trained):
            return
        for name, gradient in self.gradients().items():
            self._learn(self._scores(name), gradient * self.get_tensor(name))
            select_(gradient, self.keep(name))

    def choose(self, name: str, weight: Tensor, tiling: Tiling, level: float) -> Tensor:
        """See `TrainingMethod.choose`."""
        if _SCORES not in self.state[name]:
            return super().choose(name, weight, tiling, level)
        return compute_mask(self._scores(name), tiling, level, Rank.VALUE)

    def _learn(self, scores: Tensor, gradient: Tensor) -> None:
        """One step on the scores, whose gradient is that of the weight times the weight."""
        scores -= gradient

    def _scores(self, name: str) -> Tensor:
        """Of the weight's shape, float32 at least, zeros at first."""
        scores = self.recall(name, _SCORES)
        if scores is None:
            weight = self.get_tensor(name).detach()
            scores = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float))
            self.state[name][_SCORES] = scores
        return scores


class SoftMovement(Movement):
    """Soft movement pruning: keeps whatever scores above a threshold (arXiv 2005.07683, section 4).

    An element is kept where the sigmoid of its score, in blocks of their mean score, is above
    `threshold`. Scores are trained by gradient descent on the loss plus `penalty` times the sum of
    their sigmoids. The level follows: it is written into the configuration at every update, and
    the one that was asked for only names the pattern.

    Args:
        every: see `TrainingMethod`.
        begin: see `TrainingMethod`.
        end: see `TrainingMethod`.
        threshold: tau of the paper, in (0, 0.5): scores begin at 0, and everything is kept.
        penalty: lambda of the paper: the more, the sparser.
        score_lr: learning rate of the scores.

    Raises:
        ValueError: as `TrainingMethod`, and a threshold outside (0, 0.5).
    """

    scheduled = False

    def __init__(
        self,
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        threshold: float = 0.1,
        penalty: float = 1e-3,
        score_lr: float = 1.0,
    ) -> None:
        if not 0 < threshold < 0.5:
            raise ValueError(f"expected a threshold in (0, 0.5), found {threshold!r}")
        super().__init__(every, begin, end)
        self.threshold, self.penalty, self.score_lr = threshold, penalty, score_lr

    def check_config(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> None:
        """See `SparsifierCore.check_config`.

        Raises:
            PatternError: a pattern that fixes how many elements go in each block, such as N:M.
        """
        super().check_config(name, tensor, config)
        pattern, _ = self.pattern_of(config)
        tiling = pattern.tiling(tensor.shape, roles_of(config, tensor.ndim))
        if tiling.zeros != "all" or tiling.remainder == "dense":
            raise PatternError(
                f"{name}: pattern {pattern} counts its zeros, which a threshold cannot; "
                "choose whole blocks, or Movement"
            )

    def choose(self, name: str, weight: Tensor, tiling: Tiling, level: float) -> Tensor:
        """See `TrainingMethod.choose`; the level is what comes of it."""
        means = block_means(self._scores(name), tiling.extents, Tensor.double)
        kept = torch.sigmoid(means) > self.threshold
        blocks = kept.unsqueeze(1).expand(-1, tiling.block_size)
        return from_blocks(blocks, weight.shape, tiling.extents)

    def step(self, use_path: bool = True) -> None:
        """See `BaseSparsifier.step`. The levels that come of it are written down."""
        super().step(use_path)
        for name in self.live():
            tiling, _ = self.asks(name)
            masked = block_means((~self.keep(name)).double(), tiling.extents, Tensor.double)
            config = self.config_of(name)
            config["sparsity_level"] = float(masked.mean()) if len(masked) else 0.0
            self._target(name).asked = self.pattern_of(config)

    def _learn(self, scores: Tensor, gradient: Tensor) -> None:
        drawn = torch.sigmoid(scores)
        scores -= self.score_lr * (gradient + self.penalty * drawn * (1 - drawn))
