"""`save_pretrained` of a lowered model: it would write packed weights, which nothing could load."""

from functools import partial
from typing import Any, NoReturn

from torch import nn

from fx_sparsity.lowering.policy import LoweringError

_SAVE = "save_pretrained"


def refuse_saving(model: nn.Module) -> None:
    """Have every module that saves itself to a hub's format refuse to."""
    for module in model.modules():
        if callable(getattr(type(module), _SAVE, None)):
            vars(module)[_SAVE] = partial(_refuse, module)  # which, other than a method, pickles


def allow_saving(model: nn.Module) -> None:
    """Undo `refuse_saving`."""
    for module in model.modules():
        if getattr(vars(module).get(_SAVE), "func", None) is _refuse:
            del vars(module)[_SAVE]


def _refuse(model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    del args, kwargs
    raise LoweringError(
        f"{type(model).__name__} is lowered: from_pretrained would find packed weights, and start "
        "from others in silence. Save before lower, or call unlower(model) first"
    )
