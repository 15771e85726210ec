"""Files that shrink: tensors stored by the format that takes the fewest bytes."""

from fx_sparsity.storage.container import FileFormatError, SafetensorsFile, SafetensorsWriter
from fx_sparsity.storage.files import CompressedFile, load, save, verify
from fx_sparsity.storage.formats import FORMATS, Contents, Format, sizes, smallest_format
from fx_sparsity.storage.mapped import MappedFile, create_file
from fx_sparsity.storage.meta import parameters_on_meta
from fx_sparsity.storage.sharded import CheckpointFiles, MappedCheckpoint

__all__ = [
    "FORMATS",
    "CheckpointFiles",
    "CompressedFile",
    "Contents",
    "FileFormatError",
    "Format",
    "MappedCheckpoint",
    "MappedFile",
    "SafetensorsFile",
    "SafetensorsWriter",
    "create_file",
    "load",
    "parameters_on_meta",
    "save",
    "sizes",
    "smallest_format",
    "verify",
]
