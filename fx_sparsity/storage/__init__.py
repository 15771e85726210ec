"""Files that shrink: tensors stored by the format that takes the fewest bytes."""

from fx_sparsity.storage.files import load, save
from fx_sparsity.storage.formats import (
    FORMATS,
    Bitmask,
    Dense,
    FileFormatError,
    Format,
    smallest_format,
)
from fx_sparsity.storage.mapped import MappedFile, create_file
from fx_sparsity.storage.meta import parameters_on_meta
from fx_sparsity.storage.sharded import CheckpointFiles, MappedCheckpoint

__all__ = [
    "FORMATS",
    "Bitmask",
    "CheckpointFiles",
    "Dense",
    "FileFormatError",
    "Format",
    "MappedCheckpoint",
    "MappedFile",
    "create_file",
    "load",
    "parameters_on_meta",
    "save",
    "smallest_format",
]
