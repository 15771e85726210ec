"""`save_pretrained` of a model of which it would write what nothing could load, or fail halfway."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fx_sparsity.errors import FxSparsityError

REFUSALS: list[Callable[[nn.Module], FxSparsityError | None]] = []
"""Each says why a module cannot be saved so; None if it can. Rooms add theirs."""

_SAVE = "save_pretrained"


def guard_saving(model: nn.Module) -> None:
    """Have every module that saves itself to a hub's format ask `REFUSALS` before it does.

    Modules that none of them refuses, and which had been guarded, lose their guard.
    """
    for module in model.modules():
        if not callable(getattr(type(module), _SAVE, None)):
            continue
        if _refusal(module) is not None:
            vars(module)[_SAVE] = partial(_save, module)  # which, other than a method, pickles
        elif getattr(vars(module).get(_SAVE), "func", None) is _save:
            del vars(module)[_SAVE]


def _refusal(module: nn.Module) -> FxSparsityError | None:
    found = (refuse(module) for refuse in REFUSALS)
    return next((error for error in found if error is not None), None)


def _save(module: Any, *args: Any, **kwargs: Any) -> Any:
    if (error := _refusal(module)) is not None:
        raise error
    return type(module).save_pretrained(module, *args, **kwargs)
