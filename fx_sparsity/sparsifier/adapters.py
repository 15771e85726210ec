"""Adapters that are merged into a weight, as peft does: not while a mask is on it.

They write through `.data` into what the mask gives out, where the merged values would be lost.
"""

import weakref
from typing import Any

from torch import nn

from fx_sparsity.sparsifier.mask import masked_weights
from fx_sparsity.sparsifier.target import MaskError

_BASE = "base_layer"


def guard_merges(model: nn.Module) -> None:
    """Have the adapters of a model refuse to merge into masked weights."""
    for module in model.modules():
        if (base := module._modules.get(_BASE)) is not None:
            _guard(module, base)


def unguard_merges(model: nn.Module) -> None:
    """Let adapters merge again whose weight has no mask any more."""
    for module in model.modules():
        if isinstance(vars(module).get("merge"), _Merge) and not masked_weights(module):
            del vars(module)["merge"]


def guard_merge(module: nn.Module, name: str, submodule: nn.Module) -> None:
    """Have an adapter that gets a masked module refuse to merge."""
    if name == _BASE:
        _guard(module, submodule)


def _guard(module: nn.Module, base: nn.Module) -> None:
    if callable(getattr(type(module), "merge", None)) and masked_weights(base):
        vars(module)["merge"] = _Merge(module)


class _Merge:
    """`merge` of an adapter whose weight may have a mask."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        if masked := masked_weights(module.get_submodule(_BASE)):
            raise MaskError(
                f"merge: {', '.join(masked)} of {type(module).__name__} still masked, where merged "
                "values would be lost; squash(model, sparsifier), merge, and zero what the record "
                "masks again (Hold.apply)"
            )
        return type(module).merge(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Merge":
        module: Any = self._module()
        return _Merge(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """What a guard is when it was pickled: masked modules are not, but copies may be."""
