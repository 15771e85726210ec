"""The constants of a model that AOTInductor packaged: read from its files, which are not run.

Inductor writes the table of constants into the C++ source that it packages with the library, and
their bytes into the library, behind it, beside it in one file, or in one file each, by its options.
"""

import io
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.errors import FxSparsityError

_ENTRY = re.compile(r"\s*constants_info_\[(\d+)\]\.(\w+) = (.*);$")
_DTYPE = "cached_torch_dtype_"
_STRIDED = "cached_torch_layout_strided"
_LAYOUTS = {"strided": "", "mkldnn": "oneDNN"}
_BLOB = "_binary_constants_bin"
_ALIGNMENT = 64
_ELF = b"\x7fELF\x02\x01"
"""A library of 64 bits, the lowest byte first."""


class Pt2Error(FxSparsityError, ValueError):
    """A file that cannot be read as what `torch.export.save` or AOTInductor writes."""


@dataclass(frozen=True)
class Constant:
    """One constant of a packaged model.

    Attributes:
        fqn: that it had in the exported program; or one that Inductor made up.
        name: by which the compiled code knows it.
        shape: of the tensor.
        tensor: its values; None where they lie in the layout of another library, or are computed
            when the package is loaded.
        layout: the library whose layout it has, such as oneDNN; empty for plain tensors.
    """

    fqn: str
    name: str
    shape: tuple[int, ...]
    tensor: Tensor | None
    layout: str


@dataclass(frozen=True)
class Package:
    """A model that AOTInductor packaged.

    Attributes:
        constants: in the order of the table.
        calls: of operators that Inductor does not know, as `torch.export` serialises nodes.
    """

    constants: tuple[Constant, ...]
    calls: tuple[Mapping[str, Any], ...]


def read_package(files: Mapping[str, bytes], weights: Mapping[str, bytes]) -> Package:
    """Read the files of one packaged model.

    Args:
        files: of the model's own folder, by name.
        weights: those that all models of the package share.

    Raises:
        Pt2Error: files are missing, do not fit each other, or are of a form that is not known.
    """
    source = _only(files, ".wrapper.cpp")
    if source is None:
        raise Pt2Error("its C++ source, which tells the constants, is not in the package")
    table = _table(source.decode("utf-8", "replace"))
    config = files.get("weights_config.json")
    if config is not None:
        if len(_in_library(_only(files, ".so") or b"")) >= _bytes(table) > 0:
            raise Pt2Error("it holds its constants twice, in the library and in files of their own")
        tensors = _stored_singly(json.loads(config), weights)
    else:
        tensors = _stored_together(table, files)
    calls = _only(files, ".wrapper.json")
    return Package(
        tuple(_constant(entry, tensors) for entry in table),
        () if calls is None else tuple(json.loads(calls)["nodes"]),
    )


def _only(files: Mapping[str, bytes], ending: str) -> bytes | None:
    """The one file that ends so; None where there is none."""
    found = [content for name, content in files.items() if name.endswith(ending)]
    if len(found) > 1:
        raise Pt2Error(f"expected one file *{ending}, found {len(found)}")
    return found[0] if found else None


def _table(source: str) -> list[dict[str, str]]:
    """An entry a constant: field -> its C++ value."""
    table: list[dict[str, str]] = []
    for line in source.splitlines():
        if (match := _ENTRY.match(line)) is None:
            continue
        position, field, value = int(match[1]), match[2], match[3]
        if field == "name" and position == len(table):
            table.append({})
        if position != len(table) - 1:
            raise Pt2Error("the table of constants in its C++ source is out of order")
        table[position][field] = value.strip('"')
    needed = {"name", "dtype", "offset", "data_size", "from_folded", "shape", "stride", "layout"}
    for entry in table:
        if missing := (needed | {"original_fqn"}) - entry.keys():
            raise Pt2Error(
                f"the table of constants in its C++ source lacks {', '.join(sorted(missing))}"
            )
    return table


def _constant(entry: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Constant:
    tensor = tensors.get(entry["name"], tensors.get(entry["original_fqn"]))
    layout = entry["layout"].rpartition("cached_torch_layout_")[2].strip("_)")
    return Constant(
        entry["original_fqn"],
        entry["name"],
        _sizes(entry["shape"]),
        tensor,
        _LAYOUTS.get(layout, layout),
    )


def _sizes(braces: str) -> tuple[int, ...]:
    """`{2, 3}` or `{2L, 3L}` as a tuple."""
    return tuple(int(size.rstrip("L")) for size in braces.strip("{}").split(",") if size.strip())


def _stored_singly(config: Mapping[str, Any], weights: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Constants that were saved each in a file; the options say so in `weights_config.json`."""
    tensors = {}
    for name, (file, shape, stride, offset) in config.items():
        if file not in weights:
            raise Pt2Error(f"{file}, which holds {name}, is not in the package")
        whole = torch.load(io.BytesIO(weights[file]), weights_only=True, map_location="cpu")
        if whole.layout == torch.strided:
            tensors[name] = _view(name, whole.flatten(), shape, stride, offset)
    return tensors


def _stored_together(table: list[dict[str, str]], files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Constants that follow each other in one piece of memory, in the order of the table."""
    held = [entry for entry in table if entry["from_folded"] == "false"]
    sizes = [int(entry["data_size"]) for entry in held]
    blob = _blob(files, _bytes(table))
    whole = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.empty(0).byte()
    tensors, start = {}, 0
    for entry, size in zip(held, sizes, strict=True):
        dtype = getattr(torch, entry["dtype"].removeprefix(_DTYPE), None)
        plain = _STRIDED in entry["layout"] and isinstance(dtype, torch.dtype)
        if plain:
            assert isinstance(dtype, torch.dtype)
            # The last constant may lack what fills it up to the alignment.
            part = whole[start : start + size]
            part = part[: len(part) // dtype.itemsize * dtype.itemsize].view(dtype)
            shape, stride = _sizes(entry["shape"]), _sizes(entry["stride"])
            tensors[entry["name"]] = _view(entry["name"], part, shape, stride, int(entry["offset"]))
        start += size
    return tensors


def _bytes(table: list[dict[str, str]]) -> int:
    """What all constants take together."""
    return sum(int(entry["data_size"]) for entry in table if entry["from_folded"] == "false")


def _view(name: str, flat: Tensor, shape: Any, stride: Any, offset: int) -> Tensor:
    """A strided view of memory, which has to hold it."""
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if min((*shape, *stride, offset), default=0) < 0 or (math.prod(shape) and last >= len(flat)):
        raise Pt2Error(f"{name} does not fit into what the package holds of it")
    if not math.prod(shape):
        return flat[:0].view(shape)
    return torch.as_strided(flat, shape, stride, flat.storage_offset() + offset)


def _blob(files: Mapping[str, bytes], size: int) -> bytes:
    """The bytes of all constants.

    Raises:
        Pt2Error: the package does not hold as many.
    """
    blob = _only(files, "_weights.blob")
    if blob is None:
        library = _only(files, ".so")
        if library is None:
            raise Pt2Error("it holds no compiled library: package it without package_cpp_only")
        blob = _in_library(library)
        if size and len(blob) == 16:  # their size and a magic number, for what follows the library
            length, magic = struct.unpack("<qq", blob)
            blob = library[-length:] if 8 <= length <= len(library) else b""
            if blob[-8:] != struct.pack("<q", magic):
                raise Pt2Error("the constants behind its library are not whole")
    if len(blob) < size:
        raise Pt2Error(
            f"it holds {len(blob)} of {size} bytes of its constants: verify what they are loaded "
            "from, or package them (aot_inductor.package_constants_in_so)"
        )
    return blob


def _in_library(library: bytes) -> bytes:
    """What lies between two symbols of an ELF library.

    Raises:
        Pt2Error: it is no such library, or the symbols were stripped.
    """
    if not library.startswith(_ELF):
        raise Pt2Error("its library is no ELF file of 64 bits, the only kind that can be read")
    try:
        start, end = (_symbol(library, f"{_BLOB}_{side}".encode()) for side in ("start", "end"))
    except (struct.error, IndexError) as error:
        raise Pt2Error(f"its library is damaged: {error}") from error
    if start is None or end is None:
        raise Pt2Error("the symbols that tell where its library keeps constants were stripped")
    return library[start:end]


def _symbol(library: bytes, wanted: bytes) -> int | None:
    """Where in the file a symbol of its table lies; None where there is none of that name."""
    offset, size, count = (
        *struct.unpack_from("<Q", library, 40),
        *struct.unpack_from("<HH", library, 58),
    )
    # Each: kind, address, offset, size, and the section that it refers to.
    sections = [
        (kind, address, place, length, link)
        for _, kind, _, address, place, length, link, *_ in (
            struct.unpack_from("<IIQQQQII", library, offset + size * i) for i in range(count)
        )
    ]
    for kind, _, place, length, link in sections:
        if kind != 2:  # of all symbols, not only of those that are linked at run time
            continue
        names = sections[link]
        found = library.find(b"\0" + wanted + b"\0", names[2], names[2] + names[3])
        for entry in range(place, place + length, 24):
            name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", library, entry)
            if found >= 0 and name == found + 1 - names[2] and 0 < section < count:
                _, address, start, *_ = sections[section]
                return value - address + start
    return None
