"""What a `transformers` model may not do, or need not do, while its masks are on."""

import logging
import weakref
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from fx_sparsity.sparsifier.adapters import guard_merges, unguard_merges
from fx_sparsity.sparsifier.dense_state import original_state_dict
from fx_sparsity.sparsifier.mask import Mask
from fx_sparsity.sparsifier.utils import fqn_to_module

SPARSIFIER = "sparsifier.pt"
"""Name of the file with the sparsifier's state, beside a model that was saved with its masks on."""
_log = logging.getLogger(__name__)
_GUARDED = ("save_pretrained", "tie_weights")


def guard(model: nn.Module, sparsifier: Any) -> None:
    """Put guards on every module that saves itself to a hub's format.

    `save_pretrained` would write the parametrizations' keys, which nothing could load. It writes
    what training goes on with instead: the originals beneath the masks, under their plain names,
    the masks beside them, and the sparsifier's state. `tie_weights` looks for parameters that are
    beneath masks now; ties hold anyway, since a tied weight has one mask on every alias.

    Args:
        model: that has masks.
        sparsifier: whose masks they are; not kept alive.
    """
    guard_merges(model)
    for module in model.modules():
        if all(callable(getattr(type(module), name, None)) for name in _GUARDED):
            save = _Save(weakref.ref(module), weakref.ref(sparsifier))
            vars(module)["save_pretrained"] = save
            vars(module)["tie_weights"] = MethodType(_tie_weights, module)


def unguard(model: nn.Module) -> None:
    """Take the guards off the modules that have no masks any more."""
    unguard_merges(model)
    for module in model.modules():
        if not _masked(module):
            for name in _GUARDED:
                vars(module).pop(name, None)


def _masked(module: nn.Module) -> bool:
    return any(isinstance(child, Mask) for child in module.modules())


class _Save:
    """`save_pretrained` of a model whose masks are on."""

    def __init__(self, model: Any, sparsifier: Any) -> None:
        self._model, self._sparsifier = model, sparsifier
        self._said = False

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model, sparsifier = self._model(), self._sparsifier()
        if not _masked(model) or kwargs.get("state_dict") is not None:
            return type(model).save_pretrained(model, save_directory, *args, **kwargs)
        level = logging.DEBUG if self._said else logging.WARNING
        self._said = True
        _log.log(
            level,
            "%s holds what training goes on with: weights as they are beneath the masks, and the "
            "masks. For a sparse model call squash(model, sparsifier) first",
            save_directory,
        )
        kwargs["state_dict"] = original_state_dict(model)
        result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
        if sparsifier is not None:
            torch.save(sparsifier.state_dict(), Path(save_directory) / SPARSIFIER)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Save":
        # A copy of the model saves itself; its sparsifier, if it gets one, guards it anew.
        model = memo.get(id(self._model()), self._model())
        return _Save(weakref.ref(model), self._sparsifier)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """What a guard is when it was pickled: parametrized modules are not, but copies may be."""


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
