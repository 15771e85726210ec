"""Files that shrink: tensors stored by the format that takes the fewest bytes."""

from fx_sparsity.storage.files import load, save
from fx_sparsity.storage.formats import FORMATS, FileFormatError, Format, smallest_format

__all__ = ["FORMATS", "FileFormatError", "Format", "load", "save", "smallest_format"]
