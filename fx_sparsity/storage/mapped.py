"""Safetensors files in shared memory maps: tensors whose memory is the file itself."""

import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.storage.container import DTYPE_NAMES, FileFormatError, SafetensorsFile


class MappedFile(Mapping[str, Tensor]):
    """A safetensors file as tensors over one memory map.

    The file's pages come into memory where a tensor is read, and the system takes them back when it
    needs memory: they are no memory of the process's own. `SafetensorsFile` gives tensors that are
    copied when they are written; these are not.

    Args:
        path: of the file.
        writable: writing into a tensor writes the file; else a tensor may only be read, and writing
            into one ends the process.

    Attributes:
        path: of the file.
        metadata: what the header says beside the tensors.

    Raises:
        FileFormatError: the file contradicts itself, or does not align a tensor; it is named.
    """

    def __init__(self, path: str | Path, *, writable: bool = False) -> None:
        checked = SafetensorsFile(path)
        self.path, self.metadata, self._entries = checked.path, checked.metadata, checked.entries
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        with open(path, "r+b" if writable else "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=access)
        self._tensors = {name: self._tensor(name) for name in self._entries}

    def _tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.start % entry.dtype.itemsize:
            raise FileFormatError(
                f"{name}: expected its {entry.dtype} to start at a multiple of "
                f"{entry.dtype.itemsize} bytes in {self.path}, found {entry.start}; "
                "load the file and save it anew"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(
                self._map, dtype=torch.uint8, offset=entry.start, count=entry.nbytes
            )
        return flat.view(entry.dtype).view(entry.shape)

    def flush(self, *names: str) -> None:
        """Have what was written into tensors on the disk."""
        for name in names:
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


def create_file(path: str | Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    """Make a safetensors file of zeros, to be written through a `MappedFile`.

    Its room on the disk is taken now, since writing through a map has no way to fail.

    Args:
        path: overwritten.
        tensors: name -> (dtype, shape).
    """
    header: dict[str, Any] = {}
    offset = 0
    widest_first = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    for name in widest_first:  # so that every tensor starts at a multiple of its elements' size
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)
