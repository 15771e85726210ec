"""One-shot pruning with calibration data, from the graph."""

from fx_sparsity.pruning.prune import prune
from fx_sparsity.pruning.pruner import CalibrationError
from fx_sparsity.pruning.report import PrunedWeight, PruningReport

__all__ = [
    "CalibrationError",
    "PrunedWeight",
    "PruningReport",
    "prune",
]
