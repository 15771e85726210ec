"""Sparse operators, modules that use them, and what puts those into models."""

from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.lower import lower, unlower
from fx_sparsity.kernels.packing import PACKINGS, Packing, PackingError
from fx_sparsity.kernels.policy import LoweringError
from fx_sparsity.kernels.report import LoweredWeight, LoweringReport
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
    "SemiSparseWeightConfig",
    "SparseLinear",
    "lower",
    "sparsify_",
    "unlower",
]
