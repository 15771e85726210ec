"""`AveragedModel` of a model with masks: weights are averaged, masks are those of the model."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from fx_sparsity.sparsifier.mask import Mask


def follow_masks(module: nn.Module, name: str, submodule: nn.Module) -> None:
    """Have an `AveragedModel` that gets a model with masks not average these, with `use_buffers`.

    torch subtracts buffers, which booleans do not do, and a mask between two masks is none.
    """
    if isinstance(module, AveragedModel) and name == "module" and any(_masks(submodule)):
        vars(module)["update_parameters"] = _Update(module)


class _Update:
    """`update_parameters` of a model with masks."""

    def __init__(self, averaged: nn.Module) -> None:
        self._averaged = weakref.ref(averaged)

    def __call__(self, model: nn.Module) -> None:
        averaged: Any = self._averaged()
        pairs = list(zip(_masks(averaged.module), _masks(model), strict=True))
        with _without_masks([mask for pair in pairs for mask in pair]):
            AveragedModel.update_parameters(averaged, model)
        for mine, theirs in pairs:
            mine.mask.copy_(theirs.mask)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Update":
        averaged: Any = self._averaged()
        return _Update(memo.get(id(averaged), averaged))


def _masks(model: nn.Module) -> Iterator[Mask]:
    return (module for module in model.modules() if isinstance(module, Mask))


@contextmanager
def _without_masks(masks: list[Mask]) -> Iterator[None]:
    """Where the masks are no buffers."""
    held = [dict(mask._buffers) for mask in masks]
    try:
        for mask in masks:
            mask._buffers.clear()
        yield
    finally:
        for mask, buffers in zip(masks, held, strict=True):
            mask._buffers.update(buffers)
