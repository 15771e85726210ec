"""Sparsifiers that look at what a weight is used for, and not at the weight alone."""

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
from fx_sparsity.sparsifier.calibrated.matrix import (
    GramSparsifier,
    Pipeline,
    Refinement,
)
from fx_sparsity.sparsifier.calibrated.sparsegpt import (
    ReorderedSparseGPTSparsifier,
    SparseGPTSparsifier,
)
from fx_sparsity.sparsifier.calibrated.statistics import Statistic, Statistics

__all__ = [
    "CalibratedSparsifier",
    "Criterion",
    "CriterionSparsifier",
    "FisherSparsifier",
    "GradientSparsifier",
    "GramSparsifier",
    "MagnitudeSparsifier",
    "MovementSparsifier",
    "Pipeline",
    "RandomSparsifier",
    "Refinement",
    "ReorderedSparseGPTSparsifier",
    "Solution",
    "SparseGPTSparsifier",
    "Statistic",
    "Statistics",
    "TaylorSparsifier",
    "WandaSparsifier",
]
