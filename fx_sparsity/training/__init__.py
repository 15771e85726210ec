"""Sparse training: algorithms that move masks while a model trains, and what drives them."""

from fx_sparsity.training.distill import (
    Distillation,
    DistillationError,
    Distilled,
    kl_divergence,
)
from fx_sparsity.training.low_rank import LowRank
from fx_sparsity.training.method import TrainingMethod
from fx_sparsity.training.recover import recover
from fx_sparsity.training.recovery import Recovery, RecoveryReport, RecoveryStep
from fx_sparsity.training.sparsify import Sparsify
from fx_sparsity.training.through_mask import ThroughMask

__all__ = [
    "Distillation",
    "DistillationError",
    "Distilled",
    "LowRank",
    "Recovery",
    "RecoveryReport",
    "RecoveryStep",
    "Sparsify",
    "ThroughMask",
    "TrainingMethod",
    "kl_divergence",
    "recover",
]
