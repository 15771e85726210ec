"""Sparse operators, modules that use them, and what puts those into models."""

from fx_sparsity.kernels import cuda  # noqa: F401  gives an operator its kernel
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.lower import lower, unlower
from fx_sparsity.kernels.packed_weights import check_packed
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
    "check_packed",
    "lower",
    "sparsify_",
    "unlower",
]
