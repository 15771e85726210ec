"""Files that shrink: tensors stored by the format that takes the fewest bytes."""

from fx_sparsity.storage.checkpoint import Checkpoint, CheckpointError, find_stored_weights
from fx_sparsity.storage.compressed_file import CompressedFile
from fx_sparsity.storage.container import FileFormatError, SafetensorsFile, SafetensorsWriter
from fx_sparsity.storage.formats import (
    FORMATS,
    MOST_EXPANSION,
    Contents,
    Format,
    remap,
    sizes,
    smallest_format,
)
from fx_sparsity.storage.loading import load, verify
from fx_sparsity.storage.mapped import MappedFile, create_file
from fx_sparsity.storage.meta import parameters_on_meta
from fx_sparsity.storage.saving import export, save
from fx_sparsity.storage.sharded import CheckpointFiles, MappedCheckpoint
from fx_sparsity.storage.sparse import load_sparse
from fx_sparsity.storage.sparsify import (
    LAYOUTS,
    StoredWeight,
    convert,
    sparsify_checkpoint,
    stated_patterns,
)

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "MOST_EXPANSION",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFiles",
    "CompressedFile",
    "Contents",
    "FileFormatError",
    "Format",
    "MappedCheckpoint",
    "MappedFile",
    "SafetensorsFile",
    "SafetensorsWriter",
    "StoredWeight",
    "convert",
    "create_file",
    "export",
    "find_stored_weights",
    "load",
    "load_sparse",
    "parameters_on_meta",
    "remap",
    "save",
    "sizes",
    "smallest_format",
    "sparsify_checkpoint",
    "stated_patterns",
    "verify",
]
