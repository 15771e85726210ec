"""Writing tensors to one file, one after another: in the formats of this library, or for others."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fx_sparsity.storage.compressed_tensors import OUTSIDE, outside_name
from fx_sparsity.storage.container import DTYPE_NAMES, SafetensorsWriter, bytes_of, checksum
from fx_sparsity.storage.formats import FORMATS, Contents, sizes

KEY = "fx_sparsity"
"""Of the metadata that say what the tensors of a file are."""
HEADER_CHECKSUM = "fx_sparsity_checksum"
"""Of the checksum over everything that a header says."""
VERSION = 3
"""Files of other versions are refused. 3 counts quantized codes from their zero point."""


@dataclass(frozen=True)
class Encoded:
    """A tensor in the form in which it is written.

    Attributes:
        name: of the tensor.
        form: name of its format.
        dtype, shape: of the tensor.
        parts: name in the file -> contiguous tensor.
        zeros: elements whose bits are all zero; None where nobody counted.
    """

    name: str
    form: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    zeros: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts.values())


def encode_plain(name: str, tensor: Tensor, layout: str = "dense") -> Encoded:
    """One CPU tensor for other runtimes: dense, or as compressed-tensors does.

    Args:
        name: of the tensor. Only a matrix called `weight` is ever sparse.
        tensor: strided.
        layout: `"dense"`, `"sparse-bitmask"` or `"sparse-24-bitmask"`.
    """
    shape = tuple(tensor.shape)
    if layout != "dense" and name.endswith(".weight") and not tensor.is_complex():
        contents, form = Contents(tensor), OUTSIDE[layout]
        size = form.size(contents)
        if size is not None and size < contents.nbytes:
            zeros = tensor.numel() - contents.found[1]
            encoded = form.encode(contents)
            parts = {outside_name(name, part): data for part, data in encoded.items()}
            return Encoded(name, layout, tensor.dtype, shape, parts, zeros)
    return Encoded(name, "dense", tensor.dtype, shape, {name: tensor.contiguous()})


def encode_compressed(name: str, tensor: Tensor, form: str | None = None) -> Encoded:
    """One CPU tensor in the smallest format, or in `form` where that can hold it, else dense."""
    contents = Contents(tensor)
    found = sizes(contents)
    if form is None:
        form = min(found, key=lambda name: found[name])
    elif form not in found:
        form = "dense"
    encoded = FORMATS[form].encode(contents)
    parts = {part_name(name, part): encoded[part] for part in FORMATS[form].parts}
    zeros = None if tensor.is_complex() else tensor.numel() - contents.found[1]
    return Encoded(name, form, tensor.dtype, contents.shape, parts, zeros)


class PlainWriter:
    """Writes tensors from `encode_plain` one after another.

    Args:
        file: open for writing, empty.
        shapes: name -> shape of all tensors that may come.
        metadata: of the file.
    """

    def __init__(
        self,
        file: BinaryIO,
        shapes: Mapping[str, Sequence[int]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._metadata = {"format": "pt"} if metadata is None else metadata
        room = len(json.dumps(self._metadata)) + _room(shapes)
        self._writer = SafetensorsWriter(file, room)

    def write(self, encoded: Encoded) -> None:
        """Write a tensor. Raises `ValueError` for a name that is taken."""
        for name, part in encoded.parts.items():
            self._writer.add(name, part)

    def finish(self) -> None:
        """Write what is left, and the header."""
        self._writer.finish(self._metadata)


class CompressedWriter:
    """Writes tensors from `encode_compressed` one after another.

    Args:
        file: open for writing, empty.
        shapes: name -> shape of all tensors that may come.
        extra: further metadata, for JSON.
    """

    def __init__(
        self,
        file: BinaryIO,
        shapes: Mapping[str, Sequence[int]],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._extra = {key: value for key, value in (extra or {}).items() if value}
        room = len(json.dumps(json.dumps(self._extra))) + _room(shapes)
        self._writer = SafetensorsWriter(file, room)
        self._tensors: dict[str, Any] = {}

    def write(self, encoded: Encoded) -> None:
        """Write a tensor. Raises `ValueError` for a name that is taken."""
        for part, data in encoded.parts.items():
            self._writer.add(part, data)
        self._tensors[encoded.name] = {
            "format": encoded.form,
            "dtype": DTYPE_NAMES[encoded.dtype],
            "shape": encoded.shape,
            "crc32": checksum([bytes_of(data) for data in encoded.parts.values()]),
        }

    def finish(self) -> None:
        """Write what is left, and the header."""
        text = json.dumps({"version": VERSION, "tensors": self._tensors, **self._extra})
        header = {
            name: (entry["dtype"], tuple(entry["shape"]))
            for name, entry in self._writer.header().items()
        }
        self._writer.finish({KEY: text, HEADER_CHECKSUM: header_checksum(text, header)})


def check_layout(layout: str, known: Iterable[str]) -> None:
    """Raise `ValueError` for an unknown layout."""
    if layout not in known:
        raise ValueError(f"layout: expected one of {', '.join(known)}, found {layout!r}")


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raise `TypeError` for a tensor of a dtype that safetensors does not have."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name}: safetensors has no dtype for {tensor.dtype}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def part_name(name: str, part: str) -> str:
    """What a part of a tensor is called in a file."""
    return f"{name}::{part}" if part else name


def header_checksum(text: str, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """CRC-32 of everything that a header says, in hexadecimal."""
    listed = sorted((name, dtype, list(shape)) for name, (dtype, shape) in entries.items())
    return f"{zlib.crc32(json.dumps([text, listed]).encode()):08x}"


def _room(shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes that a header needs at most.

    For each tensor: up to four entries in the header, with offsets of up to 15 digits, or two and
    one in the metadata, whose quotes are escaped twice.
    """
    names = sum(4 * len(json.dumps(json.dumps(json.dumps(name)))) for name in shapes)
    return 256 + names + sum(400 + 3 * len(str(tuple(shape))) for shape in shapes.values())
