"""C++ operators, compiled on first use and loaded into `torch.ops`. Knows nothing of sparsity."""

from fx_sparsity._native.libraries import (
    BUILT_AHEAD,
    KERNELS,
    LIBRARIES,
    MASKS,
    PRUNING,
    SCHEMAS,
    STORAGE,
)
from fx_sparsity._native.library import Library

__all__ = [
    "BUILT_AHEAD",
    "KERNELS",
    "LIBRARIES",
    "MASKS",
    "PRUNING",
    "SCHEMAS",
    "STORAGE",
    "Library",
]
