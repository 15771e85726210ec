"""What a packing of sparse weights is, and the packings there are."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fx_sparsity.kernels.bitmask import BitmaskPacking
from fx_sparsity.kernels.block import BlockPacking
from fx_sparsity.kernels.nm import NMPacking
from fx_sparsity.kernels.panels import PackingError
from fx_sparsity.kernels.semi_structured import SemiStructuredPacking

__all__ = ["PACKINGS", "Packing", "PackingError", "packing_for"]


class Packing(Protocol):
    """A way to store the non-zeros of an [out, in] weight that an operator reads directly.

    A zero is an element that compares equal to zero, so -0.0 is one.
    """

    @property
    def name(self) -> str:
        """The key in `PACKINGS`."""
        ...

    @property
    def operator(self) -> str:
        """The operator in `torch.ops.fx_sparsity` that reads the parts, and its overload.

        Packings that stand for the same zeros share a name, each with an overload of its own: a
        compiled or exported program tells by it which layout the parts have.
        """
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the packed tensors, in the order in which the operator takes them."""
        ...

    def refusal(self, weight: Tensor) -> str | None:
        """Why this dense [out, in] weight cannot be packed, in words; None if it can."""
        ...

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Pack a weight that is not refused, of any strides."""
        ...

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense weight: exact for every kept value, +0.0 for the others. Traceable."""
        ...

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError, naming what is corrupt, unless a kernel can read `parts` safely.

        Done once when parts are made or loaded, so that a kernel need not look for bounds.
        """
        ...


PACKINGS: dict[str, Packing] = {
    packing.name: packing
    for packing in (BitmaskPacking(), NMPacking(), BlockPacking(), SemiStructuredPacking())
}


def packing_for(name: str, device: torch.device) -> str:
    """The packing that `name` means where a weight lies: "nm" has a layout of its own on CUDA."""
    return SemiStructuredPacking.name if name == NMPacking.name and device.type == "cuda" else name
