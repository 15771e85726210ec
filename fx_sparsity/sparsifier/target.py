"""Where a masked tensor lives: every module and name that holds it, and the one mask over them."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fx_sparsity.sparsifier.mask import Mask


class MaskError(ValueError):
    """A tensor cannot be masked as asked; nothing was changed."""


@dataclass
class Target:
    """One tensor under a mask.

    Attributes:
        name: FQN in the model, or the name given to `add_data`.
        owners: every (module, attribute) that holds the tensor; several where it is tied.
        mask: shared by all owners.
        in_graph: the mask is applied by a node of the owning `GraphModule`, not by a
            parametrization.
        squashed: the zeros are baked in and the parametrization is gone.
    """

    name: str
    owners: list[tuple[nn.Module, str]]
    mask: Mask
    in_graph: bool = False
    squashed: bool = False

    @property
    def original(self) -> Tensor:
        """The tensor beneath the mask."""
        module, attribute = self.owners[0]
        if not self.squashed and not self.in_graph:
            return module.parametrizations[attribute].original  # type: ignore[union-attr, index]
        return getattr(module, attribute)

    @property
    def masked(self) -> Tensor:
        """The tensor as the model sees it."""
        if self.in_graph and not self.squashed:
            return self.mask(self.original)
        return getattr(self.owners[0][0], self.owners[0][1])

    def attach(self) -> None:
        """Put the parametrization on every owner; all or none of them."""
        if self.in_graph:
            return
        done: list[tuple[nn.Module, str]] = []
        try:
            for module, attribute in self.owners:
                parametrize.register_parametrization(module, attribute, self.mask)
                done.append((module, attribute))
        except BaseException:
            for module, attribute in done:
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            raise

    def detach(self) -> None:
        """Take the parametrization off again; the original comes back untouched."""
        if self.in_graph or self.squashed:
            return
        for module, attribute in self.owners:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)

    def squash(self) -> None:
        """Bake the zeros into the original, in place, and take the parametrization off."""
        if self.squashed:
            return
        self.mask.bake(self.original)
        self.detach()
        self.squashed = True


def check_maskable(name: str, module: nn.Module, attribute: str) -> Tensor:
    """The tensor at `module.attribute`, once it is sure that a mask can go on it.

    Raises:
        MaskError: no such tensor, not floating, or parametrized already.
    """
    if parametrize.is_parametrized(module, attribute):
        kinds = [type(p).__name__ for p in module.parametrizations[attribute]]  # type: ignore[index]
        raise MaskError(
            f"{name} is already parametrized by {', '.join(kinds)}; squash or remove that first"
        )
    tensor = getattr(module, attribute, None)
    if not isinstance(tensor, Tensor):
        raise MaskError(f"{name} is not a tensor, found {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise MaskError(f"{name} has dtype {tensor.dtype}; only floating weights can be masked")
    return tensor


def owners_by_identity(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) of a model's parameters and buffers, grouped by tensor identity."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, attribute))
    return owners


class TensorState(MutableMapping[str, Any]):
    """What a sparsifier keeps about one tensor: its live mask under `"mask"`, and any counters.

    The mask is read through the mask module, so that it stays one and the same after `.to()` or
    `.half()` replaced the buffer; writing it copies in place, in the mask's own dtype.
    """

    def __init__(self, mask: Mask) -> None:
        self._mask = mask
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self._mask.mask if key == "mask" else self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "mask":
            self._values[key] = value
            return
        with torch.no_grad():
            self._mask.mask.copy_(value)

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        yield "mask"
        yield from self._values

    def __len__(self) -> int:
        return 1 + len(self._values)

    def __repr__(self) -> str:
        return repr(dict(self))
