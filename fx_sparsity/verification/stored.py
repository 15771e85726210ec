"""How a model, quantized or not, holds one weight: read it, ask what is zero, write codes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.uses import SeenWeight
from fx_sparsity.patterns import Role

LIVE_MASK = "its mask is still live: squash before you export"
"""The obstacle of a weight that was exported with its mask."""


class ZeroNotRepresentableError(FxSparsityError, ValueError):
    """No integer code of a quantized weight dequantizes to exactly zero."""


@dataclass(frozen=True)
class StoredWeight:
    """One copy of a weight, as a model holds it now.

    A tied weight may be stored more than once after quantization, with different schemes.

    Attributes:
        fqn: canonical name of the weight in the float model.
        where: the module or attribute that stores it.
        dtype: of what is stored, such as `uint8`.
        scheme: such as `per-channel affine, axis 0`; `float` where it is not quantized.
        data: the integer codes, or the float values.
        scale: broadcastable against `data`; None where it is not quantized.
        zero_point: likewise.
        code_range: smallest and largest code; None where it is not quantized.
        write: replaces what is stored by a tensor like `data`.
        view: where `data` is a view of the weight, as after transposing or splitting a packed one.
        obstacle: what stands between the stored value and its consumer, so that the one says
            nothing of the other; empty where nothing does.
        roles: of the axes of `data`, where how it is stored tells them.
        aliases: what else the weight may have been called in the float model.
        computed: the parametrizations that compute it anew, so that it cannot be written; empty as
            a rule.
        made_of: names of the tensors that hold the weight, where it lies in several.
        incidental: whether only operators read it that take it for no weight, so that no quantizer
            was meant to touch this copy.
        nameless: whether it has no name of the float model, and may be a copy of any weight.
    """

    fqn: str
    where: str
    dtype: str
    scheme: str
    data: Tensor
    write: Callable[[Tensor], None]
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    code_range: tuple[int, int] | None = None
    view: SeenWeight | None = None
    obstacle: str = ""
    roles: tuple[Role, ...] | None = None
    aliases: tuple[str, ...] = ()
    computed: str = ""
    incidental: bool = False
    made_of: tuple[str, ...] = ()
    nameless: bool = False

    def seen(self, whole: Tensor) -> Tensor:
        """The part of a tensor in the weight's own shape that this copy stores, in its order."""
        return whole if self.view is None else self.view.of(whole)

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Write `values`, in the order of this copy, where they belong in a contiguous `whole`."""
        if self.view is None:
            whole.copy_(values)
        else:
            places = self.view.of(torch.arange(whole.numel()).view(whole.shape))
            whole.view(-1)[places.reshape(-1)] = values.reshape(-1)

    @property
    def quantized(self) -> bool:
        """Whether integer codes are stored."""
        return self.scale is not None

    def dequantize(self) -> Tensor:
        """What the codes stand for: `(code - zero_point) * scale`, in float32."""
        if self.scale is None or self.zero_point is None:
            return self.data
        return (self.data.to(torch.float32) - self.zero_point) * self.scale

    def step(self) -> Tensor:
        """The distance from each code to the next, in what they stand for; nothing for floats."""
        if self.scale is None:
            return torch.zeros((), device=self.data.device)
        dtype: torch.dtype = getattr(torch, self.dtype)
        if not dtype.is_floating_point:
            return self.scale.abs().float()
        kind = torch.finfo(dtype)
        return self.dequantize().abs() * kind.eps + self.scale.abs() * kind.smallest_normal

    def at_the_end(self) -> Tensor:
        """Boolean, of the weight's shape: True where a code is the smallest or largest of all."""
        if self.code_range is None:
            return torch.zeros_like(self.data, dtype=torch.bool)
        low, high = self.code_range
        data = self.data.float() if self.data.is_floating_point() else self.data
        return (data <= low) | (data >= high)

    def zeros(self) -> Tensor:
        """Boolean, of the weight's shape: True where the stored value *is* zero.

        In code space, that is where the code equals the zero point. A fractional zero point is no
        code, so nothing there is zero, however near it comes.
        """
        if self.zero_point is None:
            return self.data == 0
        return self.data == self.zero_point

    def zero_code(self) -> Tensor:
        """The code that means zero, broadcastable against `data`.

        Raises:
            ZeroNotRepresentableError: a zero point is fractional or outside the code range.
        """
        if self.zero_point is None or self.code_range is None:
            return torch.zeros((), dtype=self.data.dtype, device=self.data.device)
        low, high = self.code_range
        bad = (self.zero_point != self.zero_point.round()) | (self.zero_point < low)
        bad |= self.zero_point > high
        if bool(bad.any()):
            example = self.zero_point[bad].flatten()[0].item()
            raise ZeroNotRepresentableError(
                f"{self.fqn} ({self.where}): expected integer zero points in {low}..{high}, found "
                f"{int(bad.count_nonzero())} others, such as {example:g}; quantize it with an "
                "observer from fx_sparsity.quantization, whose zero is a code"
            )
        return self.zero_point.to(self.data.dtype)

    def set_zero(self, keep: Tensor) -> None:
        """Write the code that means zero wherever `keep` is False; scales and the rest stay.

        Args:
            keep: boolean, of the weight's own shape.

        Raises:
            ZeroNotRepresentableError: there is no such code; nothing was changed.
        """
        self.write(torch.where(self.seen(keep), self.data, self.zero_code()))


class Forms:
    """Mixin of modules that stand in the place of another, and keep it in several forms.

    Attributes:
        forms: names of the children, each of which holds what the module in that place held.
    """

    forms: tuple[str, ...]


class OwnFormat:
    """Mixin of modules whose tensors stand for one weight together, which a reader tells.

    None of them is a weight by itself.
    """


def float_weight(fqn: str, where: str, tensor: Tensor) -> StoredWeight:
    """A weight that is not quantized."""

    @torch.no_grad()
    def write(values: Tensor) -> None:
        tensor.copy_(values)

    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredWeight(fqn, where, dtype, "float", tensor.detach(), write)


def is_float(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a plain floating-point tensor, rather than codes in a tensor's clothes."""
    return type(value) in (Tensor, nn.Parameter, nn.Buffer) and value.is_floating_point()
