"""Checkpoints larger than memory, from files to files."""

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.checkpoints.checkpoint_record import stated_patterns, stated_reasons
from fx_sparsity.checkpoints.inspection import (
    InspectedTensor,
    Inspection,
    inspect_checkpoint,
    read_tensors,
)
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
    "InspectedTensor",
    "Inspection",
    "MappedCheckpoint",
    "assign",
    "convert",
    "find_checkpoint_weights",
    "inspect_checkpoint",
    "prune_checkpoint",
    "read_tensors",
    "sparsify_checkpoint",
    "stated_patterns",
    "stated_reasons",
]
