"""Sparse training: algorithms that move masks while a model trains, and what drives them."""

from fx_sparsity.training.distill import (
    Distillation,
    DistillationError,
    Distilled,
    kl_divergence,
)
from fx_sparsity.training.drop_and_grow import DropAndGrow
from fx_sparsity.training.elsa import ELSA
from fx_sparsity.training.gradual import GradualMagnitude
from fx_sparsity.training.low_rank import LowRank
from fx_sparsity.training.method import TrainingMethod
from fx_sparsity.training.movement import Movement, SoftMovement
from fx_sparsity.training.recover import recover
from fx_sparsity.training.recovery import Recovery, RecoveryReport, RecoveryStep
from fx_sparsity.training.rigl import SEFT, RigL
from fx_sparsity.training.set import SET
from fx_sparsity.training.sparsify import Sparsify
from fx_sparsity.training.straight_through import StraightThrough
from fx_sparsity.training.through_mask import ThroughMask
from fx_sparsity.training.top_kast import TopKAST
from fx_sparsity.training.transposable_straight_through import TransposableStraightThrough

__all__ = [
    "ELSA",
    "SEFT",
    "SET",
    "Distillation",
    "DistillationError",
    "Distilled",
    "DropAndGrow",
    "GradualMagnitude",
    "LowRank",
    "Movement",
    "Recovery",
    "RecoveryReport",
    "RecoveryStep",
    "RigL",
    "SoftMovement",
    "Sparsify",
    "StraightThrough",
    "ThroughMask",
    "TopKAST",
    "TrainingMethod",
    "TransposableStraightThrough",
    "kl_divergence",
    "recover",
]
