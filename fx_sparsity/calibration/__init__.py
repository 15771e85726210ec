"""One-shot pruning with calibration data, from the graph."""

from fx_sparsity.calibration.checkpoint import prune_checkpoint
from fx_sparsity.calibration.prune import prune
from fx_sparsity.calibration.pruner import CalibrationError
from fx_sparsity.calibration.report import PrunedWeight, PruningReport

__all__ = [
    "CalibrationError",
    "PrunedWeight",
    "PruningReport",
    "prune",
    "prune_checkpoint",
]
