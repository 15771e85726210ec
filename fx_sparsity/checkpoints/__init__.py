"""Checkpoints larger than memory, from files to files."""

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError, find_checkpoint_weights
from fx_sparsity.checkpoints.prune_checkpoint import prune_checkpoint
from fx_sparsity.checkpoints.sharded import CheckpointFiles, MappedCheckpoint
from fx_sparsity.checkpoints.sparsify_checkpoint import (
    LAYOUTS,
    CheckpointReport,
    CheckpointWeight,
    convert,
    sparsify_checkpoint,
    stated_patterns,
)

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFiles",
    "CheckpointReport",
    "CheckpointWeight",
    "MappedCheckpoint",
    "convert",
    "find_checkpoint_weights",
    "prune_checkpoint",
    "sparsify_checkpoint",
    "stated_patterns",
]
