"""One level for a whole model, spread over its weights."""

from fx_sparsity.pruning.allocation.levels import Levels, Prunable
from fx_sparsity.pruning.allocation.rules import (
    OWL,
    Allocation,
    ErdosRenyi,
    GlobalRanking,
    LeastError,
    MeasuredAllocation,
    OutputAllocation,
    Seen,
    Uniform,
    divergence,
    squared_change,
)

__all__ = [
    "OWL",
    "Allocation",
    "ErdosRenyi",
    "GlobalRanking",
    "LeastError",
    "Levels",
    "MeasuredAllocation",
    "OutputAllocation",
    "Prunable",
    "Seen",
    "Uniform",
    "divergence",
    "squared_change",
]
