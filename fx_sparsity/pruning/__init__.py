"""One-shot pruning with calibration data, from the graph."""

from fx_sparsity.pruning.evaluation import Evaluation, agreement, cosine, perplexity
from fx_sparsity.pruning.prune import prune
from fx_sparsity.pruning.pruner import CalibrationError
from fx_sparsity.pruning.reconstruction import Reconstruction
from fx_sparsity.pruning.report import PrunedWeight, PruningReport, RebuiltBlock
from fx_sparsity.pruning.search import search
from fx_sparsity.pruning.sensitivity import Sensitivity, sensitivity
from fx_sparsity.pruning.sparsity_plan import Budget, BudgetError, SparsityPlan

__all__ = [
    "Budget",
    "BudgetError",
    "CalibrationError",
    "Evaluation",
    "PrunedWeight",
    "PruningReport",
    "RebuiltBlock",
    "Reconstruction",
    "Sensitivity",
    "SparsityPlan",
    "agreement",
    "cosine",
    "perplexity",
    "prune",
    "search",
    "sensitivity",
]
