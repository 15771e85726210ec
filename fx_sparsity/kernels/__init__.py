"""Sparse operators, and modules that use them."""

from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.packing import PACKINGS, Packing, PackingError
from fx_sparsity.kernels.row_table import RowTable

__all__ = [
    "PACKINGS",
    "Packing",
    "PackingError",
    "RowPrunedEmbedding",
    "RowPrunedEmbeddingBag",
    "RowTable",
    "SparseLinear",
]
