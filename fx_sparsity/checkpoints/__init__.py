"""Checkpoints larger than memory, from files to files."""

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.checkpoints.checkpoint_record import stated_patterns
from fx_sparsity.checkpoints.mapped_checkpoint import MappedCheckpoint
from fx_sparsity.checkpoints.prune_checkpoint import prune_checkpoint
from fx_sparsity.checkpoints.report import CheckpointReport, CheckpointWeight
from fx_sparsity.checkpoints.rewriting import LAYOUTS
from fx_sparsity.checkpoints.sparsify_checkpoint import convert, sparsify_checkpoint
from fx_sparsity.checkpoints.weights import assign, find_checkpoint_weights

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointError",
    "CheckpointReport",
    "CheckpointWeight",
    "MappedCheckpoint",
    "assign",
    "convert",
    "find_checkpoint_weights",
    "prune_checkpoint",
    "sparsify_checkpoint",
    "stated_patterns",
]
