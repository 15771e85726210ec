"""The C++ operators of calibrated sparsifiers, and where they can be called."""

import torch
from torch import Tensor

from fx_sparsity._native import PRUNING


def covers(*tensors: Tensor) -> bool:
    """Whether the operators can work on these: float32 or boolean, on the CPU."""
    plain = all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bool) for t in tensors)
    return plain and PRUNING.ready()
