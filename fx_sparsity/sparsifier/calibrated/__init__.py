"""Sparsifiers that look at what a weight is used for, and not at the weight alone."""

from fx_sparsity.sparsifier.calibrated import allocation
from fx_sparsity.sparsifier.calibrated.admm import ADMMSparsifier
from fx_sparsity.sparsifier.calibrated.base import CalibratedSparsifier, Solution
from fx_sparsity.sparsifier.calibrated.criterion import (
    Criterion,
    CriterionSparsifier,
    FisherSparsifier,
    GradientSparsifier,
    MagnitudeSparsifier,
    MovementSparsifier,
    RandomSparsifier,
    TaylorSparsifier,
    WandaSparsifier,
)
from fx_sparsity.sparsifier.calibrated.exact_update import ExactUpdate
from fx_sparsity.sparsifier.calibrated.matrix import (
    GramSparsifier,
    Pipeline,
    Refinement,
)
from fx_sparsity.sparsifier.calibrated.rules import (
    OWL,
    Allocation,
    ErdosRenyi,
    GlobalRanking,
    LeastError,
    MeasuredAllocation,
    Seen,
    Uniform,
)
from fx_sparsity.sparsifier.calibrated.sparsegpt import (
    ReorderedSparseGPTSparsifier,
    SparseGPTSparsifier,
)
from fx_sparsity.sparsifier.calibrated.statistics import Statistic, Statistics
from fx_sparsity.sparsifier.calibrated.swaps import Swaps

__all__ = [
    "OWL",
    "ADMMSparsifier",
    "Allocation",
    "CalibratedSparsifier",
    "Criterion",
    "CriterionSparsifier",
    "ErdosRenyi",
    "ExactUpdate",
    "FisherSparsifier",
    "GlobalRanking",
    "GradientSparsifier",
    "GramSparsifier",
    "LeastError",
    "MagnitudeSparsifier",
    "MeasuredAllocation",
    "MovementSparsifier",
    "Pipeline",
    "RandomSparsifier",
    "Refinement",
    "ReorderedSparseGPTSparsifier",
    "Seen",
    "Solution",
    "SparseGPTSparsifier",
    "Statistic",
    "Statistics",
    "Swaps",
    "TaylorSparsifier",
    "Uniform",
    "WandaSparsifier",
    "allocation",
]
