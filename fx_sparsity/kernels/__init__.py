"""Sparse operators, and modules that use them."""

from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.packing import PACKINGS, Packing, PackingError

__all__ = ["PACKINGS", "Packing", "PackingError", "SparseLinear"]
