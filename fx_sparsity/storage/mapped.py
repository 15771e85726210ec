"""Safetensors files in memory maps: tensors whose memory is the file, read where they are used."""

import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.storage.formats import FileFormatError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Names of dtypes in a safetensors header."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000


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
            size = file.seek(0, 2)
            file.seek(0)
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else _LONGEST_HEADER + 1
            if length > min(size - 8, _LONGEST_HEADER):
                raise FileFormatError(f"{path}: expected a safetensors file, found no header")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise FileFormatError(f"{path}: its header is no JSON: {error}") from error
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), 0, access=access)
        start = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        _check_header(self.path, header, size - start)
        self._spans = {
            name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
            for name, entry in header.items()
        }
        self._tensors = {name: self._tensor(name, entry) for name, entry in header.items()}

    def _tensor(self, name: str, entry: Mapping[str, Any]) -> Tensor:
        begin, end = self._spans[name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        if begin % dtype.itemsize:
            raise FileFormatError(
                f"{name}: expected its {dtype} to begin at a multiple of {dtype.itemsize} bytes in "
                f"{self.path}, found {begin}; load the file and save it anew"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=torch.uint8, offset=begin, count=end - begin)
        return flat.view(dtype).view(shape)

    def flush(self, *names: str) -> None:
        """Have what was written into tensors on the disk; into all of them without names."""
        for name in names or self:
            begin, end = self._spans[name]
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin:
                self._map.flush(page, end - page)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def create_file(
    path: str | Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Make a safetensors file of zeros, to be written through a `MappedFile`.

    Its room on the disk is taken now, since writing through a map has no way to fail.

    Args:
        path: overwritten.
        tensors: name -> (dtype, shape).
        metadata: for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    widest_first = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    for name in widest_first:  # so that every tensor begins at a multiple of its elements' size
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)


def _check_header(path: Path, header: Any, size: int) -> None:
    """Raise `FileFormatError` unless the tensors of a header fill `size` bytes, without overlap."""
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise FileFormatError(f"{name}: its entry in {path} is malformed: {entry}") from error
        if dtype not in DTYPES:
            raise FileFormatError(f"{name}: {path} has it in {dtype}, of which torch knows nothing")
        if not whole or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise FileFormatError(
                f"{name}: {path} has {dtype} of shape {shape} in the bytes from {begin} to {end}"
            )
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            raise FileFormatError(f"{name}: expected at byte {place} of {path}, found at {begin}")
        place = end
    if place != size:
        raise FileFormatError(f"{path}: expected {place} bytes of tensors, found {size}")
