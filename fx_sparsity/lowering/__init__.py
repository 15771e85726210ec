"""Sparse kernels where they pay: what measures, decides and rewrites."""

from fx_sparsity.lowering.layer_time import layer_milliseconds
from fx_sparsity.lowering.lower import lower, unlower
from fx_sparsity.lowering.packed_weights import check_packed
from fx_sparsity.lowering.policy import LoweringError
from fx_sparsity.lowering.report import LoweredWeight, LoweringReport

__all__ = [
    "LoweredWeight",
    "LoweringError",
    "LoweringReport",
    "check_packed",
    "layer_milliseconds",
    "lower",
    "unlower",
]
