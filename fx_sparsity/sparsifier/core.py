"""What model-bound and data sparsifiers share: named targets, their state, stepping, squashing."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.patterns import Pattern, Role
from fx_sparsity.sparsifier.target import MaskError, Target, TensorState


class SparsifierCore(ABC):
    """Owns names, configurations, masks and state. Users derive from the two public bases.

    Attributes:
        defaults: configuration of every tensor that does not override it.
        state: name -> the live mask and whatever counters a subclass keeps.
        enable_mask_update: `step` does nothing while this is False.
        steps: how often `step` was called.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None) -> None:
        self.defaults: dict[str, Any] = dict(defaults or {})
        self.state: dict[str, TensorState] = {}
        self.enable_mask_update = True
        self.steps = 0
        self._targets: dict[str, Target] = {}
        self._said_squashed = False

    # -- what subclasses supply ------------------------------------------------------------------

    @abstractmethod
    def config_of(self, name: str) -> dict[str, Any]:
        """The merged configuration of one tensor. Raises `ValueError` for an unknown name."""

    @abstractmethod
    def _update(self, name: str) -> None:
        """Compute and write the mask of one tensor."""

    def check_config(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> None:
        """Raise if `config` cannot work for `tensor`. Called before anything is changed."""
        del name, tensor, config

    def check_update(self, name: str) -> None:
        """Raise if the mask of `name` cannot be computed. Called for all before any is changed."""
        self.get_tensor(name)

    def check_updates(self, names: Sequence[str]) -> None:
        """`check_update` for all of `names`: the place to ask a device about them all at once."""
        for name in names:
            self.check_update(name)

    def pattern_of(self, config: Mapping[str, Any]) -> tuple[Pattern, float] | None:
        """Pattern and level that a configuration asks for; None where the method knows neither.

        Raises:
            PatternError: the pattern is malformed.
        """
        pattern = config.get("pattern")
        return None if pattern is None else (Pattern.parse(pattern), config["sparsity_level"])

    # -- what users call -------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Every tensor under this sparsifier, in the order it was added."""
        return list(self._targets)

    def get_mask(self, name: str) -> Tensor:
        """The live mask of a tensor; editing it in place is seen by the model.

        Raises:
            ValueError: no tensor of that name.
        """
        return self._target(name).mask.mask

    def get_data(self, name: str, return_original: bool = True) -> Tensor:
        """A tensor as it stands under its mask, or as the model sees it.

        Args:
            name: FQN, or the name given to `add_data`.
            return_original: the tensor beneath the mask; False gives the masked one.

        Raises:
            ValueError: no tensor of that name, or the original is gone after squashing.
            DetachedError: the sparsifier has no model.
        """
        target = self._target(name)
        if not return_original:
            return target.masked
        if target.squashed:
            raise ValueError(
                f"{name}: its mask is squashed, the original no longer exists; "
                "ask with return_original=False"
            )
        return target.original

    def get_tensor(self, name: str) -> Tensor:
        """The tensor that a name stands for: beneath its mask, or with the zeros baked in.

        Raises:
            ValueError: no tensor of that name.
            DetachedError: the sparsifier has no model.
        """
        return self._target(name).original

    def is_given(self, name: str) -> bool:
        """Whether a tensor's mask came from elsewhere and has not been recomputed since."""
        return self._target(name).given

    def asked_of(self, name: str) -> tuple[Pattern, float] | None:
        """Pattern and level of a tensor's mask as it is; None where nothing is known of it.

        A schedule may have changed the configuration since the mask was computed.
        """
        target = self._target(name)
        if target.given:
            return None
        return target.asked or self.pattern_of(self.config_of(name))

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Further names of each tensor, where it is tied or its module is shared."""
        return {}

    def is_squashed(self, name: str) -> bool:
        """Whether the zeros of a tensor are baked in."""
        return self._target(name).squashed

    def step(self, use_path: bool = True) -> None:
        """Recompute every mask that is not squashed yet.

        Whatever is raised, every mask is as it was.

        Args:
            use_path: of no effect, as in `torch.ao.pruning`.

        Raises:
            ValueError: a tensor cannot be ranked (NaN), or has no data yet (meta device); it is
                named.
            DetachedError: the sparsifier has no model.
        """
        del use_path
        if not self.enable_mask_update:
            self.steps += 1
            return
        squashed = [name for name, target in self._targets.items() if target.squashed]
        if squashed and not self._said_squashed:
            self._said_squashed = True
            warnings.warn(
                f"step() leaves {len(squashed)} squashed tensors alone, such as {squashed[0]!r}",
                stacklevel=2,
            )
        names = [name for name in self._targets if name not in squashed]
        if absent := [name for name in names if self.get_tensor(name).is_meta]:
            raise MaskError(
                f"{absent[0]} has no data yet, it is on the meta device; "
                "load the model before step()"
            )
        with torch.no_grad():
            self.check_updates(names)
            self._update_all(names)
        self.steps += 1

    # -- for the two bases -----------------------------------------------------------------------

    def _update_all(self, names: Sequence[str]) -> None:
        """Compute all masks, or put back those that were there."""
        asked = {name: self.pattern_of(self.config_of(name)) for name in names}
        undo: list[Callable[[], None]] = []
        try:
            for name in names:
                undo.append(self._target(name).mask.saved())
                self._update(name)
        except BaseException:
            for put_back in undo:
                put_back()
            raise
        for name in names:
            target = self._target(name)
            target.given, target.asked = False, asked[name]

    def _arguments(self, name: str) -> dict[str, Any]:
        """What `update_mask` is given of a configuration."""
        return self.config_of(name)

    def _squash(self, names: Iterable[str]) -> None:
        targets = [self._target(name) for name in names]
        for target in targets:
            target.check_detachable()
        done: list[str] = []
        try:
            for target in targets:
                target.squash()
                done.append(target.name)
        except BaseException as error:
            error.add_note(
                f"{len(done)} of {len(targets)} masks are squashed, the last of them "
                f"{done[-1] if done else 'none'}; the others are on. The call may be repeated"
            )
            raise

    def _target(self, name: str) -> Target:
        if name not in self._targets:
            known = ", ".join(list(self._targets)[:5]) or "none"
            raise ValueError(
                f"data with specified name does not exist: {name!r} (known: {known}"
                f"{', ...' if len(self._targets) > 5 else ''})"
            )
        return self._targets[name]

    def _register(self, target: Target, counters: dict[str, Any] | None = None) -> None:
        """Take a target, attached already, under this sparsifier."""
        self._targets[target.name] = target
        target.mask.name = target.name
        self.state[target.name] = TensorState(target.mask, counters)

    def _forget(self, name: str) -> None:
        """Take a target's mask off, without applying it, and drop it."""
        target = self._targets.pop(name)
        if target.in_graph:
            target.mask.mask.fill_(1)  # the node may live on, also in what was compiled from it
        target.detach()
        del self.state[name]


def roles_of(config: Mapping[str, Any], ndim: int) -> tuple[Role, ...]:
    """Roles of a tensor's axes: `config["roles"]` if discovery found them, else by convention.

    The convention is torch's own: [out, in, kernel...]; a single axis is `in`.
    """
    if (roles := config.get("roles")) is not None:
        return tuple(roles)
    convention: dict[int, Role] = {0: "out", 1: "in"}
    return ("in",) if ndim == 1 else tuple(convention.get(d, "kernel") for d in range(ndim))
