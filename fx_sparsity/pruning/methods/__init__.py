"""Sparsifiers that look at what a weight is used for, and not at the weight alone."""

from fx_sparsity.pruning.methods.admm import ADMMSparsifier
from fx_sparsity.pruning.methods.alps import ALPS, QuickALPSSparsifier
from fx_sparsity.pruning.methods.calibrated import CalibratedSparsifier, Solution
from fx_sparsity.pruning.methods.criterion import (
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
from fx_sparsity.pruning.methods.exact_update import ExactUpdate
from fx_sparsity.pruning.methods.matrix import GramSparsifier, Pipeline, Refinement
from fx_sparsity.pruning.methods.moonshot import Moonshot
from fx_sparsity.pruning.methods.rounding import Rounding
from fx_sparsity.pruning.methods.sparsegpt import ReorderedSparseGPTSparsifier, SparseGPTSparsifier
from fx_sparsity.pruning.methods.statistics import Statistic, Statistics
from fx_sparsity.pruning.methods.swaps import Swaps

__all__ = [
    "ALPS",
    "ADMMSparsifier",
    "CalibratedSparsifier",
    "Criterion",
    "CriterionSparsifier",
    "ExactUpdate",
    "FisherSparsifier",
    "GradientSparsifier",
    "GramSparsifier",
    "MagnitudeSparsifier",
    "Moonshot",
    "MovementSparsifier",
    "Pipeline",
    "QuickALPSSparsifier",
    "RandomSparsifier",
    "Refinement",
    "ReorderedSparseGPTSparsifier",
    "Rounding",
    "Solution",
    "SparseGPTSparsifier",
    "Statistic",
    "Statistics",
    "Swaps",
    "TaylorSparsifier",
    "WandaSparsifier",
]
