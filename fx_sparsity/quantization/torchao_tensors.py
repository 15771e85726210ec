"""Telling torchao's tensors from others, and what is within, without importing torchao."""

from torch import Tensor


def is_torchao(value: object) -> bool:
    """Whether `value` is a tensor of one of torchao's classes, or of one derived from them."""
    return isinstance(value, Tensor) and any(
        base.__module__.partition(".")[0] == "torchao" for base in type(value).__mro__
    )


def within(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that one of torchao's is made of, such as codes and scales; of others, itself."""
    if not is_torchao(tensor):
        return (tensor,)
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return tuple(inner for name in names for inner in within(getattr(tensor, name)))
