"""C++ operators, compiled on first use and loaded into `torch.ops`. Knows nothing of sparsity."""

from fx_sparsity._native.libraries import KERNELS, LIBRARIES, MASKS, PRUNING, STORAGE
from fx_sparsity._native.library import Library

__all__ = ["KERNELS", "LIBRARIES", "MASKS", "PRUNING", "STORAGE", "Library"]
