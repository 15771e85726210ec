"""What a packing of sparse weights is, and the packings there are."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fx_sparsity.kernels.bitmask import BitmaskPacking
from fx_sparsity.kernels.block import BlockPacking
from fx_sparsity.kernels.int4 import DenseInt4Packing
from fx_sparsity.kernels.int4_bitmask import BitmaskInt4Packing
from fx_sparsity.kernels.int4_block import BlockInt4Packing
from fx_sparsity.kernels.int4_nm import NMInt4Packing
from fx_sparsity.kernels.nm import NMPacking
from fx_sparsity.kernels.panels import PackingError
from fx_sparsity.kernels.semi_structured import SemiStructuredPacking

__all__ = ["DENSE", "INT4", "PACKINGS", "Int4Packing", "Packing", "PackingError", "packing_for"]


DENSE = "dense"
"""How the names of packings begin that leave nothing out."""


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


class Int4Packing(Packing, Protocol):
    """A packing of 4-bit codes, which may have zero points by groups; see int4.py."""

    def refusal(self, weight: Tensor, zero_point: Tensor | None = None) -> str | None:
        """See `Packing`; the weight is what codes have beyond `zero_point`, int8 [out, groups]."""
        ...

    def pack(self, weight: Tensor, zero_point: Tensor | None = None) -> dict[str, Tensor]:
        """See `refusal`."""
        ...


INT4: dict[str, Int4Packing] = {
    packing.name: packing
    for packing in (
        BitmaskInt4Packing(),
        NMInt4Packing(),
        BlockInt4Packing(),
        DenseInt4Packing(),
    )
}
"""Those that take 4-bit codes alone."""

PACKINGS: dict[str, Packing] = {
    packing.name: packing
    for packing in (BitmaskPacking(), NMPacking(), BlockPacking(), SemiStructuredPacking())
}
PACKINGS.update(INT4)


def packing_for(name: str, device: torch.device, in_groups: bool = False) -> str:
    """The packing that `name` means for a weight.

    Args:
        name: of a packing; "nm" has a layout of its own on CUDA.
        device: where the weight lies.
        in_groups: whether it has scales by groups, for which the packings of 4-bit codes are.
    """
    if in_groups and f"{name}_int4" in INT4:
        return f"{name}_int4"
    return SemiStructuredPacking.name if name == NMPacking.name and device.type == "cuda" else name
