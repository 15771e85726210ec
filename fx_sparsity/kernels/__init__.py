"""Sparse operators, and the modules that call them."""

from fx_sparsity.kernels import cuda  # noqa: F401  gives an operator its kernel
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.native import libraries
from fx_sparsity.kernels.packings import PACKINGS, Packing, PackingError
from fx_sparsity.kernels.row_table import RowTable

__all__ = [
    "PACKINGS",
    "Packing",
    "PackingError",
    "RowPrunedEmbedding",
    "RowPrunedEmbeddingBag",
    "RowTable",
    "SparseLinear",
    "libraries",
]
