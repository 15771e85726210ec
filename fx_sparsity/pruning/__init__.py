"""One-shot pruning with calibration data, from the graph."""

from fx_sparsity.pruning.prune import prune
from fx_sparsity.pruning.pruner import CalibrationError
from fx_sparsity.pruning.reconstruction import Reconstruction
from fx_sparsity.pruning.report import PrunedWeight, PruningReport, RebuiltBlock

__all__ = [
    "CalibrationError",
    "PrunedWeight",
    "PruningReport",
    "RebuiltBlock",
    "Reconstruction",
    "prune",
]
