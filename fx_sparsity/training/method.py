"""What every algorithm of sparse training is: a sparsifier that takes part in training steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fx_sparsity.masks import ScoreError, compute_mask
from fx_sparsity.patterns import Tiling
from fx_sparsity.sparsifier import Mask, MaskError, WeightNormSparsifier
from fx_sparsity.sparsifier.core import roles_of
from fx_sparsity.sparsifier.norm import Norm
from fx_sparsity.sparsifier.placement import Placement
from fx_sparsity.training.through_mask import ThroughMask


class TrainingMethod(WeightNormSparsifier):
    """Base class of the algorithms. It moves masks at the steps `range(begin, end, every)`.

    A step is one of the optimizer's; step 0 is before the first. `Sparsify` calls, around each of
    them, `after_backward` and `after_step`. In between, a weight's `grad` holds what the method let
    through: where `wants_gradients`, the gradient of masked elements, too.

    By itself it keeps what has the largest norm: gradual magnitude pruning, with a schedule.
    Subclasses override `choose`, and `wants_gradients` and `after_backward` if they need gradients.

    Args:
        every: optimizer steps from one update of the masks to the next.
        begin: step of the first update.
        end: step from which the masks are frozen; None updates them to the last.
        norm: see `WeightNormSparsifier`.

    Attributes:
        trained: optimizer steps taken so far.
        optimizer: whose state goes with the weights; set by `Sparsify`.
        run: the `Sparsify` that it takes part in; None before the first.

    Raises:
        ValueError: `every` below 1, or a `begin` below 0 or not before `end`.
    """

    through = False
    """Whether the masks have to let gradients of masked elements through."""
    wide = False
    """Whether they do so element by element."""
    scheduled = True
    """Whether levels are what is asked for, so that a schedule may move them."""
    returns = False
    """Whether a masked element may come back with the value that it had."""
    dense_gradients = False
    """Whether it edits gradients, which must not be sparse, though masks let none through."""

    def __init__(
        self, every: int = 100, begin: int = 0, end: int | None = None, norm: Norm = "L1"
    ) -> None:
        if every < 1 or begin < 0 or (end is not None and end <= begin):
            raise ValueError(
                "expected every >= 1 and 0 <= begin < end, "
                f"found every={every}, begin={begin}, end={end}"
            )
        super().__init__(norm=norm)
        self.defaults |= {"pattern": "unstructured"}
        self.every, self.begin, self.end = every, begin, end
        self.trained = 0
        self.optimizer: Optimizer | None = None
        self.run: Any = None

    # -- when ------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether masks move after `step` steps of the optimizer."""
        due = step >= self.begin and (step - self.begin) % self.every == 0
        return due and not self.is_frozen(step)

    def updates(self, steps: int | None = None) -> int | None:
        """How often masks move in all; None if that depends on `steps`, which are not known."""
        if self.end is not None:
            return len(range(self.begin, self.end, self.every))
        return None if steps is None else len(range(self.begin, steps + 1, self.every))

    def is_frozen(self, step: int) -> bool:
        """Whether masks move no more after `step` steps."""
        return self.end is not None and step >= self.end

    def wants_gradients(self, step: int) -> bool:
        """Whether the gradients of step `step`, the first is 0, are to reach masked elements.

        Masks that they move, move after that step.
        """
        del step
        return False

    # -- what `Sparsify` calls -------------------------------------------------------------------

    def after_backward(self) -> None:
        """Look at the gradients of a step, and edit them, before the optimizer sees them."""

    def after_step(self) -> None:
        """The optimizer has made a step: count it, and move the masks if they are due."""
        self.trained += 1
        if self.is_due(self.trained):
            self.step()
        self.let_through()

    def let_through(self) -> None:
        """Let the gradients of the next step reach what `wants_gradients` says."""
        wanted = self.wants_gradients(self.trained)
        for mask in self._through_masks().values():
            mask.through.fill_(wanted)

    # -- what a method decides -------------------------------------------------------------------

    def choose(self, name: str, weight: Tensor, tiling: Tiling, level: float) -> Tensor:
        """The new mask of one weight.

        Args:
            name: FQN.
            weight: the original beneath the mask.
            tiling: its pattern in storage dimensions.
            level: share of blocks that go.

        Returns:
            Boolean, of the weight's shape: True is kept.

        Raises:
            ScoreError: the weight cannot be ranked.
        """
        del name
        scores, rank = self.ranked(weight)
        return compute_mask(scores, tiling, level, rank)

    def update_mask(  # type: ignore[override]
        self, module: nn.Module, tensor_name: str, **config: Any
    ) -> None:
        """See `BaseSparsifier.update_mask`."""
        del config
        name = self.name_of(module, tensor_name)
        try:
            self.get_mask(name).copy_(self.choose(name, self.get_tensor(name), *self.asks(name)))
        except ScoreError as error:
            raise ScoreError(f"{name}: {error}") from error

    def asks(self, name: str) -> tuple[Tiling, float]:
        """A weight's pattern in storage dimensions, and its level now."""
        weight, config = self.get_tensor(name), self.config_of(name)
        pattern, level = self.pattern_of(config)
        return pattern.tiling(weight.shape, roles_of(config, weight.ndim)), level

    # -- masks and state -------------------------------------------------------------------------

    def live(self) -> dict[str, Tensor]:
        """FQN -> original, of the weights whose masks are not squashed."""
        return {name: self.get_tensor(name) for name in self.names if not self.is_squashed(name)}

    def gradients(self) -> dict[str, Tensor]:
        """FQN -> gradient of the original, of the weights that have one; edit them in place."""
        found = {name: weight.grad for name, weight in self.live().items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def recall(self, name: str, key: str) -> Tensor | None:
        """A tensor that the method keeps of a weight, on its device; part of the state."""
        counters, device = self.state[name].counters, self.get_tensor(name).device
        if key in counters and counters[key].device != device:
            counters[key] = counters[key].to(device)
        return counters.get(key)

    def keep(self, name: str) -> Tensor:
        """The mask of a weight as a boolean tensor."""
        return self._target(name).mask.keep

    def new_mask(self, mask: Tensor) -> Mask:
        """See `BaseSparsifier.new_mask`."""
        return ThroughMask(mask, self.wide) if self.through else Mask(mask)

    def plan_masks(
        self, model: nn.Module, config: Sequence[Mapping[str, Any]]
    ) -> dict[str, Placement]:
        """See `BaseSparsifier.plan_masks`.

        Raises:
            MaskError: also for a weight on which no mask of this method's kind can be.
        """
        placements = super().plan_masks(model, config)
        for name, placement in placements.items():
            self._check_mask(name, placement.target.mask)
        return placements

    def _check_mask(self, name: str, mask: Mask) -> None:
        fits = isinstance(mask, ThroughMask) and mask.through.ndim == self.wide * mask.mask.ndim
        if self.through and not fits:
            raise MaskError(
                f"{name}: its mask lets no gradients through as {type(self).__name__} needs; "
                "prepare the module itself, and `squash` or `unprepare` what masked it before"
            )

    def _through_masks(self) -> dict[str, ThroughMask]:
        masks = {name: self._target(name).mask for name in self.live()}
        return {name: mask for name, mask in masks.items() if isinstance(mask, ThroughMask)}

    def _live_in(self, model: nn.Module) -> None:
        super()._live_in(model)
        self.let_through()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["attributes"] = {**state["attributes"], "optimizer": None, "run": None}
        return state

    def state_dict(self) -> dict[str, Any]:
        """See `BaseSparsifier.state_dict`; `trained` and the method's name go with it."""
        return {**super().state_dict(), "trained": self.trained, "method": type(self).__name__}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """See `BaseSparsifier.load_state_dict`.

        Raises:
            MaskError: also for the state of another method, which keeps other things of weights.
        """
        mine = type(self).__name__
        if (theirs := state_dict.get("method", mine)) != mine:
            raise MaskError(
                f"the state is that of a {theirs}, and this is a {mine}; go on with a {theirs}, or "
                "squash and prepare the model anew"
            )
        before, self.trained = self.trained, int(state_dict.get("trained", 0))
        try:
            super().load_state_dict(state_dict, strict)
        except BaseException:
            self.trained = before
            raise


def at_least_float32(scores: Tensor) -> Tensor:
    """Scores of a lower precision as float32, so that fewer of them are equal."""
    return scores.float() if scores.dtype.itemsize < 4 else scores
