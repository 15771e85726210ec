"""Noticing writes into tensors that are computed anew whenever someone asks for them."""

import torch
from torch import Tensor

from fx_sparsity.masks import native

_NOTHING = torch.empty(0)


class LostWrites:
    """Whether the tensor that was given out last has been written into.

    Its version counter is kept, which all views of it and `detach()` share, and not its memory.
    What goes through `.data` counts elsewhere, and is not noticed.
    """

    def __init__(self) -> None:
        self._counter: Tensor | None = None
        self._version = 0

    def __reduce__(self) -> tuple[type["LostWrites"], tuple[()]]:
        """A copy has given nothing out; a copied counter would count the copying as a write."""
        return LostWrites, ()

    def give(self, tensor: Tensor) -> None:
        """A tensor is given out, in place of the one before; those that are traced do not count."""
        self._counter = None
        traced = native.is_traced(tensor)
        if type(tensor) is Tensor and not (traced or tensor.is_inference() or tensor.is_meta):
            counter = tensor.detach()
            counter.data = _NOTHING  # the counter stays, the memory goes when others let go of it
            self._counter, self._version = counter, tensor._version

    def take(self) -> bool:
        """Whether the tensor was written into since; it is told once."""
        counter, self._counter = self._counter, None
        return counter is not None and counter._version > self._version
