"""The driver: one object that makes a training loop sparse, through its optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fx_sparsity.sparsifier import BaseScheduler, MaskError
from fx_sparsity.training.method import TrainingMethod
from fx_sparsity.training.training_checks import check_model, check_schedule, check_weights


class Sparsify:
    """Has a method take part in every step of an optimizer, until `remove`.

    The training loop stays as it is: what the method does between backward and the optimizer's
    step, and after that, hangs on the optimizer. So it is right under a `GradScaler` that skips a
    step, under gradient accumulation, and where a trainer calls the optimizer.

    The first masks are computed right away if they are due at step 0. Then, whenever they moved,
    `schedule` goes on by one. A method takes part in one run: the one before is removed.

    Args:
        model: with the method's masks; wrapped or not.
        method: has prepared the model.
        optimizer: trains it; made before the masks or after; wrapped, as by accelerate, or not.
        schedule: of the method's levels; None leaves them as they are configured.
        steps: of the optimizer, that training is going to take; None if that is not known.

    Raises:
        MaskError: the method has no masks on the model; or a masked weight that the optimizer does
            not train, that is frozen, or whose gradients are sparse where the method needs them
            all: it is named.
        ValueError: a schedule or a method that is not at its end when the masks freeze or training
            ends, a schedule of another sparsifier, or one for a method that makes its own levels.
    """

    def __init__(
        self,
        model: nn.Module,
        method: TrainingMethod,
        optimizer: Optimizer,
        schedule: BaseScheduler | None = None,
        steps: int | None = None,
    ) -> None:
        while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = wrapped
        self.model, self.method = model, method
        self.optimizer, self.schedule = optimizer, schedule
        check_model(model, method)
        check_weights(method, optimizer)
        self._check()
        check_schedule(method, schedule, steps)
        if method.run is not None:
            method.run.remove()
        method.optimizer, method.run = optimizer, self
        self._looked = False
        if method.trained == 0 and method.is_due(0):
            method.step()
            self._reschedule()
        method.let_through()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def after_backward(self) -> None:
        """Have the method look at the gradients now.

        Call it, if at all, before gradients are clipped, and once they are unscaled; otherwise it
        happens when the optimizer is called. Of gradients that are not finite, whose step a
        `GradScaler` will skip, nothing is learned.
        """
        self._looked = True
        if not self.method.wants_gradients(self.method.trained) or self._are_finite():
            self._look()

    def state_dict(self) -> dict[str, Any]:
        """Method and schedule, as plain data; model and optimizer have states of their own."""
        schedule = None if self.schedule is None else self.schedule.state_dict()
        return {"method": self.method.state_dict(), "schedule": schedule}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called. Order does not matter among the four states.

        Raises:
            MaskError: a weight is missing or does not fit its mask; nothing was changed.
            ValueError: one of both states has a schedule and the other has none, or another one.
        """
        if (state_dict["schedule"] is None) != (self.schedule is None):
            raise ValueError("the state was saved with a schedule, or this run has one; not both")
        if self.schedule is None:
            self.method.load_state_dict(state_dict["method"])
            return
        before = self.schedule.state_dict()
        self.schedule.load_state_dict(state_dict["schedule"])
        try:
            self.method.load_state_dict(state_dict["method"])
        except BaseException:
            self.schedule.load_state_dict(before)
            raise
        self.schedule.load_state_dict(state_dict["schedule"])  # into the new configurations

    def remove(self) -> None:
        """Let the optimizer go. The masks stay on until `squash`."""
        for hook in self._hooks:
            hook.remove()

    def _are_finite(self) -> bool:
        found = self.method.gradients().values()  # dense: sparse ones are refused where wanted
        return bool(nn.utils.get_total_norm(found).isfinite())

    def _look(self) -> None:
        self._check()
        with torch.no_grad():
            self.method.after_backward()
        self._looked = True

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The gradients are there, or a closure will compute them within the step."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            return (optimizer,), {**kwargs, "closure": self._followed(closure)}
        if not self._looked and not self._skipped():
            self._unscale()
            self._look()
        return None

    def _followed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def followed() -> Any:
            self._looked = False
            loss = closure()
            if not self._looked:  # the closure may have asked for it, before it clips
                self._look()
            return loss

        return followed

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self._looked = False
        if self._skipped():
            return
        with torch.no_grad():
            self.method.after_step()
        if self.method.is_due(self.method.trained):
            self._reschedule()

    def _reschedule(self) -> None:
        if self.schedule is not None:
            self.schedule.step()

    def _unscale(self) -> None:
        """Do at once what a `GradScaler` leaves to a fused optimizer: gradients as they are."""
        if (scale := getattr(self.optimizer, "grad_scale", None)) is None:
            return
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.div_(scale.to(parameter.grad.device))
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def _skipped(self) -> bool:
        """Whether a fused optimizer finds infinite gradients, and does nothing with them."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _check(self) -> None:
        """Raise unless the optimizer trains the weights that lie beneath the masks now."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, weight in self.method.live().items():
            if id(weight) not in held:
                raise MaskError(
                    f"{name}: the optimizer does not train the parameter beneath its mask; "
                    "it was made before that was replaced, or for other parameters"
                )
