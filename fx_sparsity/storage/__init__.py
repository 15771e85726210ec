"""Files that shrink: tensors stored by the format that takes the fewest bytes."""

from fx_sparsity.storage.container import FileFormatError, SafetensorsFile, SafetensorsWriter
from fx_sparsity.storage.files import CompressedFile, load, save, verify
from fx_sparsity.storage.formats import FORMATS, Contents, Format, sizes, smallest_format

__all__ = [
    "FORMATS",
    "CompressedFile",
    "Contents",
    "FileFormatError",
    "Format",
    "SafetensorsFile",
    "SafetensorsWriter",
    "load",
    "save",
    "sizes",
    "smallest_format",
    "verify",
]
