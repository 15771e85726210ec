"""Capture, discovery, mapping and the passes."""

from fx_sparsity.graph.context_blocks import OpenBlocks
from fx_sparsity.graph.discovery import find_weights
from fx_sparsity.graph.example_inputs import InputError
from fx_sparsity.graph.frontends import CaptureError
from fx_sparsity.graph.mapping import Assignment, MappingError, MappingLike, SparsityMapping
from fx_sparsity.graph.passes import AnnotateWeights, InsertMasks, RemoveMasks
from fx_sparsity.graph.prepare import prepare, squash, unprepare
from fx_sparsity.graph.weight_map import DenseParameter, Reason, Use, WeightMap, WeightSite

__all__ = [
    "AnnotateWeights",
    "Assignment",
    "CaptureError",
    "DenseParameter",
    "InputError",
    "InsertMasks",
    "MappingError",
    "MappingLike",
    "OpenBlocks",
    "Reason",
    "RemoveMasks",
    "SparsityMapping",
    "Use",
    "WeightMap",
    "WeightSite",
    "find_weights",
    "prepare",
    "squash",
    "unprepare",
]
