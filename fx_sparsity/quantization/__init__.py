"""Sparsity and quantization, in either order, with a proof."""

from fx_sparsity.quantization.backend import (
    BACKENDS,
    Backend,
    BackendError,
    Prepared,
    Quantized,
    get_backend,
)
from fx_sparsity.quantization.compare import OrderComparison, OrderResult, compare_orders
from fx_sparsity.quantization.flow import Order, sparsify_and_quantize, sparsify_codes
from fx_sparsity.quantization.grid import Grid
from fx_sparsity.quantization.observers import (
    FarRowsAlone,
    IgnoreZeros,
    IntegerZeroPoint,
    zero_cost,
)
from fx_sparsity.quantization.rounded import RoundedModel, quantize_rounded
from fx_sparsity.quantization.torch_ao.post_training import post_training_sparse_quantize

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "FarRowsAlone",
    "Grid",
    "IgnoreZeros",
    "IntegerZeroPoint",
    "Order",
    "OrderComparison",
    "OrderResult",
    "Prepared",
    "Quantized",
    "RoundedModel",
    "compare_orders",
    "get_backend",
    "post_training_sparse_quantize",
    "quantize_rounded",
    "sparsify_and_quantize",
    "sparsify_codes",
    "zero_cost",
]
