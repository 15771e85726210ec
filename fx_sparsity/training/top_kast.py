"""Top-KAST: more learns than is used."""

from torch import Tensor

from fx_sparsity.masks import compute_mask
from fx_sparsity.patterns import Tiling
from fx_sparsity.sparsifier.mask import selected
from fx_sparsity.sparsifier.norm import Norm
from fx_sparsity.training.method import TrainingMethod

_LEARNS = "learns"


class TopKAST(TrainingMethod):
    """The largest weights are used, and more of them learn (arXiv 2106.03517).

    Forward reads set A, by pattern and level. Gradients reach set B, which the same pattern gives
    at a lower level, and which A is a part of. `penalty` draws weights to zero, by its square: A as
    it is, and B without A `1 / density` times as much, so that what explores has to win. From `end`
    on, B is A.

    Args:
        every: see `TrainingMethod`.
        begin: see `TrainingMethod`.
        end: see `TrainingMethod`.
        explores: share of what is masked that learns all the same.
        penalty: coefficient of the exploration loss.
        norm: see `WeightNormSparsifier`.

    Raises:
        ValueError: as `TrainingMethod`, and a share outside [0, 1].
    """

    through = True
    wide = True
    returns = True

    def __init__(
        self,
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        explores: float = 0.5,
        penalty: float = 1e-5,
        norm: Norm = "L1",
    ) -> None:
        if not 0 <= explores <= 1:
            raise ValueError(f"expected a share in [0, 1], found {explores!r}")
        super().__init__(every, begin, end, norm)
        self.explores, self.penalty = explores, penalty

    def choose(self, name: str, weight: Tensor, tiling: Tiling, level: float) -> Tensor:
        """See `TrainingMethod.choose`. Set B is kept beside."""
        scores, rank = self.ranked(weight)
        used = compute_mask(scores, tiling, level, rank)
        learns = compute_mask(scores, tiling, level * (1 - self.explores), rank)
        self.state[name][_LEARNS] = learns | used
        return used

    def let_through(self) -> None:
        """Let gradients reach set B, until the masks are frozen."""
        for name, mask in self._through_masks().items():
            learns = self.recall(name, _LEARNS)
            if learns is None or self.is_frozen(self.trained):
                mask.through.fill_(False)
            else:
                mask.through.copy_(learns)

    def after_backward(self) -> None:
        """Add the gradient of the exploration loss."""
        if not self.penalty or self.is_frozen(self.trained):
            return
        masks = self._through_masks()
        for name, gradient in self.gradients().items():
            weight, keep, through = self.get_tensor(name), self.keep(name), masks[name].through
            gradient.add_(selected(weight, keep), alpha=self.penalty)
            if density := int(keep.count_nonzero()) / max(1, keep.numel()):
                explored = selected(weight, through & ~keep)
                gradient.add_(explored, alpha=self.penalty / density)
