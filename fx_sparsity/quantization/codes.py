"""8-bit codes in the place of a module's float `weight`, which is computed from them when read."""

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fx_sparsity.verification.stored import OwnFormat, StoredWeight


class Codes(OwnFormat, nn.Module):
    """A matrix as 8-bit codes, with a scale and a zero point for each row.

    Casts such as `.half()` change the dtype of what is computed; codes, scales and zero points
    keep theirs.

    Args:
        quantized: a `torch.quint8` tensor, [rows, dim], quantized by rows; copied.
        like: gives dtype and device of the matrix.

    Attributes:
        codes: uint8, [rows, dim].
        scale, zero_point: float32, [rows, 1].
        dtype: of the matrix.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantized: Tensor, like: Tensor) -> None:
        super().__init__()
        device = like.device
        by_row = quantized.q_per_channel_scales(), quantized.q_per_channel_zero_points()
        scale, zero_point = (values.float().view(-1, 1).clone() for values in by_row)
        self.register_buffer("codes", quantized.int_repr().to(device))
        self.register_buffer("scale", scale.to(device))
        self.register_buffer("zero_point", zero_point.to(device))
        self.dtype = like.dtype

    def forward(self) -> Tensor:
        """The matrix, `(code - zero_point) * scale`: exactly zero where the code says zero."""
        return self.codes.float().sub_(self.zero_point).mul_(self.scale).to(self.dtype)

    def stored(self, fqn: str) -> StoredWeight:
        """The matrix as weight `fqn`."""

        @torch.no_grad()
        def write(new: Tensor) -> None:
            self.codes.copy_(new)

        return StoredWeight(
            fqn,
            fqn,
            "uint8",
            "per-channel affine (float zero point), axis 0",
            self.codes.clone(),
            write,
            self.scale,
            self.zero_point,
            (0, 255),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Seen as integers, scales and zero points are moved like all tensors, but not cast.
        codes = fn(self.codes)
        scale, zero_point = (
            fn(values.view(torch.int32)).view(torch.float32)
            for values in (self.scale, self.zero_point)
        )
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        self.codes, self.scale, self.zero_point = codes, scale, zero_point
        return self

    def extra_repr(self) -> str:
        """Shape and dtype."""
        return f"{'x'.join(map(str, self.codes.shape))}, read as {self.dtype}"


class CodedWeight(nn.Module):
    """Mixin in front of a module's class: `weight` is a property that reads the codes."""

    _weight_codes: Codes

    @property
    def weight(self) -> Tensor:
        """Dequantized anew at each access; changes to it are lost."""
        return self._weight_codes()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made at run time: a pickle holds the class that it was made from.
        _, base = type(self).__bases__
        return _new, (base,), self.__getstate__()


def hold_codes(module: nn.Module, codes: Codes) -> None:
    """Put `codes` in the place of the weight of `module`, in place.

    The module keeps its identity, methods, hooks and other state; its class becomes a subclass of
    what it was. Parametrizations of the weight are gone.
    """
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight")
    del module.weight
    base: Any = type(module)
    module.__class__ = _coded(base)
    module._weight_codes = codes


@cache
def _coded(base: Any) -> Any:
    return type(f"Quantized{base.__name__}", (CodedWeight, base), {"__module__": base.__module__})


def _new(base: Any) -> nn.Module:
    """An empty module, for unpickling and copying to fill."""
    coded = _coded(base)
    module: nn.Module = coded.__new__(coded)
    return module
