"""Files that shrink: tensors stored by the format that takes the fewest bytes."""

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
from fx_sparsity.storage.load_sparse import load_sparse
from fx_sparsity.storage.loading import faults, load
from fx_sparsity.storage.mapped import MappedFile
from fx_sparsity.storage.meta import parameters_on_meta
from fx_sparsity.storage.onnx_export import export_onnx
from fx_sparsity.storage.saving import export, save
from fx_sparsity.storage.stored_bytes import stored_bytes

__all__ = [
    "FORMATS",
    "MOST_EXPANSION",
    "CompressedFile",
    "Contents",
    "FileFormatError",
    "Format",
    "MappedFile",
    "SafetensorsFile",
    "SafetensorsWriter",
    "export",
    "export_onnx",
    "faults",
    "load",
    "load_sparse",
    "parameters_on_meta",
    "remap",
    "save",
    "sizes",
    "smallest_format",
    "stored_bytes",
]
