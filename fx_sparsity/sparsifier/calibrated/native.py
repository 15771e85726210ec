"""The C++ operators of calibrated sparsifiers, and where they can be called."""

from pathlib import Path

import torch
from torch import Tensor

from fx_sparsity._native import Library

LIBRARY = Library("calibrated", [Path(__file__).parent / "kernels" / "ops.cpp"])


def covers(*tensors: Tensor) -> bool:
    """Whether the operators can work on these: float32 or boolean, on the CPU."""
    plain = all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bool) for t in tensors)
    return plain and LIBRARY.ready()
