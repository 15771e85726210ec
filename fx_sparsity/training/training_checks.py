"""What would go wrong in the middle of a long run, told before its first step."""

import logging

from torch import nn
from torch.optim import Optimizer

from fx_sparsity.sparsifier import BaseScheduler, MaskError
from fx_sparsity.training.drop_and_grow import DropAndGrow
from fx_sparsity.training.method import TrainingMethod
from fx_sparsity.training.optimizer_state import state_of_elements

_log = logging.getLogger(__name__)


def check_model(model: nn.Module, method: TrainingMethod) -> None:
    """Raise unless a method has live masks on a model, wrapped or not.

    Raises:
        MaskError: it has none, or they are on another model.
    """
    kind = type(method).__name__
    if not method.names or not any(part is method.model for part in model.modules()):
        raise MaskError(
            f"{kind} has no masks on this {type(model).__name__}; call prepare with both first"
        )
    if not method.live():
        raise MaskError(f"the masks of {kind} are squashed, such as that of {method.names[0]}")


def check_weights(method: TrainingMethod, optimizer: Optimizer) -> None:
    """Raise if a masked weight cannot be trained as the method needs.

    Weight decay shrinks what lies beneath a mask, too. Where that may come back, it is logged.

    Raises:
        MaskError: naming the weight.
    """
    decays = {
        id(weight): group.get("weight_decay", 0)
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    shrinking = []
    for name, weight in method.live().items():
        if not weight.requires_grad:
            raise MaskError(f"{name} is frozen, requires_grad is False; unfreeze it or exclude it")
        if hasattr(weight, "device_mesh"):  # DTensor, which not every build of torch has
            raise MaskError(
                f"{name}: is sharded, a DTensor; masks are those of whole weights: train with "
                "DistributedDataParallel, or exclude it"
            )
        module = method.config_of(name)["module"]
        if (method.through or method.dense_gradients) and getattr(module, "sparse", False):
            raise MaskError(
                f"{name}: {type(method).__name__} needs the gradients of all elements, and those "
                "of its module are sparse; make it with sparse=False"
            )
        if isinstance(method, DropAndGrow):
            state_of_elements(optimizer, name, weight)
        if method.returns and decays.get(id(weight)):
            shrinking.append(name)
    if shrinking:
        _log.info(
            "weight_decay shrinks what lies beneath the masks of %d weights, such as %s, and may "
            "come back; put them into a group of their own if it should not",
            *(len(shrinking), shrinking[0]),
        )


def check_schedule(
    method: TrainingMethod, schedule: BaseScheduler | None, steps: int | None
) -> None:
    """Raise if method or schedule are not done when the masks freeze, or when training ends.

    Weights that grow begin at zero, so that they have to be trained afterwards.

    Raises:
        ValueError: naming the step, and the weight whose level still moves.
    """
    kind = type(method).__name__
    if steps is not None and method.end is not None and method.end > steps:
        raise ValueError(
            f"{kind} moves masks until step {method.end}, and training ends at step {steps}; "
            "choose an earlier end"
        )
    if steps is not None and isinstance(method, DropAndGrow) and method.is_due(steps):
        raise ValueError(
            f"{kind} would grow weights after step {steps}, the last, and they would stay zero; "
            f"choose an end, such as {max(method.begin + 1, steps * 3 // 4)}"
        )
    if schedule is None:
        return
    if schedule.sparsifier is not method:
        raise ValueError("the schedule is that of another sparsifier; make one of this method")
    if not method.scheduled:
        raise ValueError(f"{kind} makes its own levels; leave the schedule out")
    if (updates := method.updates(steps)) is None:
        return
    last, next_ = schedule.values_at(max(updates - 1, 0)), schedule.values_at(updates)
    for name, level in last.items():
        if abs(level - next_[name]) > 1e-9:
            raise ValueError(
                f"{name} is at level {level:.3g} at the last of {updates} updates, and its "
                f"schedule goes on, to {next_[name]:.3g} next; make the schedule shorter, or "
                "update more often"
            )
