"""2:4 on CUDA: torch's own semi-structured tensors, which run on cuSPARSELt or CUTLASS."""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured


def semi_structured_refusal(weight: Tensor) -> str | None:
    """Why a dense [out, in] weight cannot be one of torch's semi-structured tensors.

    Asked in this order: the zeros, the device, and what torch itself has kernels for, which depends
    on the dtype (float16, bfloat16, int8, float32, and float8 on recent devices) and sizes.

    Returns:
        None if it can.
    """
    if not follows_2_4(weight):
        return "its zeros are not 2:4 along the inputs"
    if weight.device.type != "cuda":
        return f"torch has semi-structured kernels on CUDA alone, the weight is on {weight.device}"
    try:
        to_sparse_semi_structured(weight[:0].new_zeros(weight.shape))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"torch refuses it: {error}"
    return None


def follows_2_4(weight: Tensor) -> bool:
    """Whether every four neighbours along the inputs of a [out, in] weight hold two zeros."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight == 0).view(len(weight), -1, 4).sum(2) >= 2).all())


def put_semi_structured(module: nn.Linear) -> None:
    """Compress the weight of a module, in place, to half of its bytes and the positions."""
    weight = to_sparse_semi_structured(module.weight.detach().contiguous())
    module.weight = nn.Parameter(weight, requires_grad=False)


def is_semi_structured(tensor: object) -> TypeGuard[Tensor]:
    """Whether a weight is one of torch's semi-structured tensors."""
    return isinstance(tensor, SparseSemiStructuredTensor)


def to_dense(weight: Tensor) -> Tensor:
    """What a semi-structured tensor stands for: exact for every kept value, +0.0 for the others."""
    return torch.where((dense := weight.to_dense()) == 0, dense.new_zeros(()), dense)
