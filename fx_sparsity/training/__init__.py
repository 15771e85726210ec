"""Sparse training: algorithms that move masks while a model trains, and what drives them."""

from fx_sparsity.training.method import TrainingMethod
from fx_sparsity.training.sparsify import Sparsify
from fx_sparsity.training.through_mask import ThroughMask

__all__ = ["Sparsify", "ThroughMask", "TrainingMethod"]
