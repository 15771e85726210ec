"""What a `transformers` model may not do, or need not do, while its masks are on."""

from types import MethodType
from typing import Any

from torch import nn

from fx_sparsity.sparsifier.mask import Mask
from fx_sparsity.sparsifier.utils import fqn_to_module

_GUARDED = ("save_pretrained", "tie_weights")


def guard(model: nn.Module) -> None:
    """Put guards on every module that saves itself to a hub's format.

    `save_pretrained` would write the parametrizations' keys, which nothing could load: unless it is
    given a plain state, it raises and says what to do. `tie_weights` looks for parameters that are
    beneath masks now; ties hold anyway, since a tied weight has one mask on every alias.
    """
    for module in model.modules():
        if all(callable(getattr(type(module), name, None)) for name in _GUARDED):
            vars(module)["save_pretrained"] = MethodType(_save_pretrained, module)
            vars(module)["tie_weights"] = MethodType(_tie_weights, module)


def unguard(model: nn.Module) -> None:
    """Take the guards off the modules that have no masks any more."""
    for module in model.modules():
        if not _masked(module):
            for name in _GUARDED:
                vars(module).pop(name, None)


def _masked(module: nn.Module) -> bool:
    return any(isinstance(child, Mask) for child in module.modules())


def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    if _masked(self) and kwargs.get("state_dict") is None:
        raise RuntimeError(
            "save_pretrained: the model's masks are still on, and their keys would not load "
            "anywhere; call squash(model, sparsifier) first, or pass "
            "state_dict=dense_state_dict(model)"
        )
    return type(self).save_pretrained(self, *args, **kwargs)


def _tie_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not _masked(self):
        return type(self).tie_weights(self, *args, **kwargs)
    ties = getattr(self, "all_tied_weights_keys", None) or {}
    for target, source in ties.items():
        if _original(self, target) is not _original(self, source):
            raise RuntimeError(
                f"tie_weights: {target} and {source} are two tensors, and masks are on; "
                "call squash(model, sparsifier), tie, and prepare again"
            )
    return None


def _original(model: nn.Module, fqn: str) -> Any:
    owner, _, attribute = fqn.rpartition(".")
    beneath = fqn_to_module(model, f"{owner}.parametrizations.{attribute}.original")
    return fqn_to_module(model, fqn) if beneath is None else beneath
