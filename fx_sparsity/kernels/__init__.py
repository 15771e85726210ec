"""Sparse operators, modules that use them, and what puts those into models."""

from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.lower import lower, unlower
from fx_sparsity.kernels.packed_weights import read_packed
from fx_sparsity.kernels.packing import PACKINGS, Packing, PackingError
from fx_sparsity.kernels.policy import LoweringError
from fx_sparsity.kernels.report import LoweredWeight, LoweringReport
from fx_sparsity.kernels.row_table import RowTable
from fx_sparsity.kernels.sparsify import (
    BlockSparseWeightConfig,
    SemiSparseWeightConfig,
    sparsify_,
)

__all__ = [
    "PACKINGS",
    "BlockSparseWeightConfig",
    "LoweredWeight",
    "LoweringError",
    "LoweringReport",
    "Packing",
    "PackingError",
    "RowPrunedEmbedding",
    "RowPrunedEmbeddingBag",
    "RowTable",
    "SemiSparseWeightConfig",
    "SparseLinear",
    "lower",
    "read_packed",
    "sparsify_",
    "unlower",
]
