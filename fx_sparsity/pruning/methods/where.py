"""Choosing between values by a mask: bit by bit, without a branch that a mask could mispredict."""

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def select(mask: Tensor, values: Tensor, others: Tensor | None = None) -> Tensor:
    """`torch.where(mask, values, others)`, which on a CPU takes several times as long.

    Args:
        mask: boolean.
        values: of any dtype, of the mask's shape.
        others: of that shape and dtype; None stands for +0.0.
    """
    kind = _INTEGERS[values.itemsize]
    chosen = mask.view(torch.int8).neg().to(kind)  # all bits, or none
    bits = values.view(kind)
    if others is None:
        return chosen.bitwise_and_(bits).view(values.dtype)
    rest = others.view(kind)
    return chosen.bitwise_and_(bits ^ rest).bitwise_xor_(rest).view(values.dtype)
