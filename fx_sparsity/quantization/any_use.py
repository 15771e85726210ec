"""8-bit codes that any operator reads, for weights that torchao's own tensors cannot stand for.

torchao's tensors take part in a linear layer, a lookup or a slice, and refuse other operators. This
one is dequantized for those, at use: it is smaller, and no faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8Tensor

from fx_sparsity.patterns import INPUT_ROLES, Role

_LARGEST = 127
aten = torch.ops.aten


@dataclass
class Int8AnyUseConfig(AOBaseConfig):
    """8-bit weights for `TorchAOBackend` that any operator reads, one scale a result.

    Attributes:
        shared: axes along which elements share a scale. None: those that the operator sums over, or
            along the looked-up vector, as discovery found them.
    """

    shared: tuple[int, ...] | None = None


class Int8AnyUseTensor(Int8Tensor):
    """An `Int8Tensor` of any shape, for any operator, that stands for `qdata * scale`.

    What only picks elements (a selected expert, looked-up rows, an embedding bag) dequantizes what
    it picks; `F.linear` is torchao's; anything else is given the whole weight, dequantized.

    `scale` is float32 and broadcasts against `qdata`.

    Raises:
        TypeError: an operator that would write to it, or an item that would be set. What is picked
            or reshaped is a copy: writing to that changes nothing here.
    """

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """What the codes stand for, in `output_dtype`; None is the dtype of the weight."""
        return _values(self.qdata, self.scale, output_dtype or self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in cls._ATEN_OP_TABLE[cls]:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.is_mutable:
            raise TypeError(f"{func} would write to a weight of 8-bit codes")
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def int8_any_use(weight: Tensor, shared: Sequence[int]) -> Int8AnyUseTensor:
    """Round a weight to 8-bit codes, symmetric about zero, so that zeros stay zeros.

    The scale is the largest magnitude / 127.

    Args:
        weight: floating, of any shape.
        shared: axes along which elements share a scale.

    Raises:
        ValueError: NaN or infinite values.
    """
    values = weight.detach().float()
    if not bool(values.isfinite().all()):
        raise ValueError("expected finite values, found NaN or infinite ones")
    scale = values.abs().amax(dim=tuple(shared), keepdim=True) / _LARGEST
    scale.masked_fill_(scale == 0, 1)
    codes = (values / scale).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    block = [size if axis in shared else 1 for axis, size in enumerate(weight.shape)]
    return Int8AnyUseTensor(codes, scale, block, weight.dtype)


def shared_axes(roles: Sequence[Role]) -> tuple[int, ...]:
    """Axes along which the elements of a weight of these roles share a scale."""
    return tuple(axis for axis, role in enumerate(roles) if role in INPUT_ROLES or role == "kernel")


def _values(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.to(scale.dtype) * scale).to(dtype)


def _picked(weight: Int8AnyUseTensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """The same elements of codes and of scales, which are expanded without copying."""
    return _values(pick(weight.qdata), pick(weight.scale.expand_as(weight.qdata)), weight.dtype)


@Int8AnyUseTensor.implements(
    [aten.select.int, aten.slice.Tensor, aten.index.Tensor, aten.index_select.default]
)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _picked(args[0], lambda part: func(part, *args[1:], **kwargs))


@Int8AnyUseTensor.implements(aten._to_copy.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight, dtype = args[0], kwargs.pop("dtype", args[0].dtype)
    if not dtype.is_floating_point:
        return func(weight.dequantize(), dtype=dtype, **kwargs)
    codes, scale = (func(part, **kwargs) for part in (weight.qdata, weight.scale))
    return Int8AnyUseTensor(codes, scale, weight.block_size, dtype)


@Int8AnyUseTensor.implements(aten.embedding.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _picked(args[0], lambda part: part[args[1]])


@Int8AnyUseTensor.implements(
    [aten._embedding_bag.default, aten._embedding_bag_forward_only.default]
)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    weight, indices, *rest = args
    # A table of what is looked up, in its order, and a last row for what counts as padding.
    rows = _picked(weight, lambda part: part[indices])
    places = torch.arange(len(indices), dtype=indices.dtype, device=indices.device)
    padding = rest[6] if len(rest) > 6 else -1
    if padding >= 0:
        places = torch.where(indices == padding, len(indices), places)
        rest[6] = len(indices)
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return func(rows, places, *rest, **kwargs)


@Int8AnyUseTensor.implements_torch_function(Tensor.__setitem__)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> None:
    into, where, values = args
    if isinstance(into, Int8AnyUseTensor):  # torch would write to what `select` gives, a copy
        raise TypeError("an item of a weight of 8-bit codes cannot be set")
    func(into, where, values.dequantize())


@Int8AnyUseTensor.implements_torch_function(Tensor.share_memory_)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Int8AnyUseTensor:
    for part in (args[0].qdata, args[0].scale):  # the tensor around them has no memory of its own
        part.share_memory_()
    return args[0]


@Int8AnyUseTensor.implements_torch_function(Tensor.is_shared)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return args[0].qdata.is_shared() and args[0].scale.is_shared()


torch.serialization.add_safe_globals([Int8AnyUseTensor])
