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

__all__ = [
    "FORMATS",
    "Bitmask",
    "Dense",
    "FileFormatError",
    "Format",
    "load",
    "save",
    "smallest_format",
]
