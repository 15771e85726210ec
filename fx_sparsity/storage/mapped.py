"""Safetensors files in memory maps: tensors whose memory is the file, read where they are used."""

import mmap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fx_sparsity.storage.container import Entry, FileFormatError, read_layout


class MappedFile(Mapping[str, Tensor]):
    """A safetensors file as tensors over one memory map.

    The file's pages come into memory where a tensor is read, and the system takes them back when it
    needs memory: they are no memory of the process's own.

    Args:
        path: of the file.
        writable: writing into a tensor writes the file; else a tensor may only be read, and writing
            into one ends the process.

    Attributes:
        path: of the file.
        metadata: what the header says beside the tensors.

    Raises:
        FileFormatError: the header contradicts itself or the file's length; the tensor is named.
    """

    def __init__(self, path: str | Path, *, writable: bool = False) -> None:
        self.path = Path(path)
        with open(path, "r+b" if writable else "rb") as file:
            layout = read_layout(file, str(path))
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), 0, access=access)
        self.metadata = layout.metadata
        self._entries = layout.entries
        self._tensors = {name: self._tensor(name, entry) for name, entry in layout.entries.items()}

    def _tensor(self, name: str, entry: Entry) -> Tensor:
        dtype = entry.dtype
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.start % dtype.itemsize:
            raise FileFormatError(
                f"{name}: expected its {dtype} to begin at a multiple of {dtype.itemsize} bytes in "
                f"{self.path}, found {entry.start}; load the file and save it anew"
            )
        start, count = entry.start, entry.nbytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=count)
        return flat.view(dtype).view(entry.shape)

    def flush(self, *names: str) -> None:
        """Have what was written into tensors on the disk; into all of them without names."""
        for name in names or self:
            entry = self._entries[name]
            page = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
            if entry.nbytes:
                self._map.flush(page, entry.start + entry.nbytes - page)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
