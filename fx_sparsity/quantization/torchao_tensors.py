"""Telling torchao's tensors from others, without importing torchao."""

from torch import Tensor


def is_torchao(value: object) -> bool:
    """Whether `value` is a tensor of one of torchao's classes, or of one derived from them."""
    return isinstance(value, Tensor) and any(
        base.__module__.partition(".")[0] == "torchao" for base in type(value).__mro__
    )
