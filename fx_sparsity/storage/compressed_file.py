"""A compressed file, or any safetensors file, tensor by tensor."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.storage import described_state as states
from fx_sparsity.storage.compressed_tensors import OUTSIDE
from fx_sparsity.storage.container import (
    DTYPE_NAMES,
    DTYPES,
    FileFormatError,
    SafetensorsFile,
    check_shape,
    checksum,
    elements_of,
    without_collections,
)
from fx_sparsity.storage.formats import FORMATS, Format
from fx_sparsity.storage.memory import empty
from fx_sparsity.storage.writing import HEADER_CHECKSUM, KEY, VERSION, header_checksum, part_name

_ALL: dict[str, Format] = {**FORMATS, **OUTSIDE}
_PART_NAMES = {part for form in FORMATS.values() for part in form.parts if part}


class CompressedFile:
    """A file from `save`, or any safetensors file: what it holds, tensor by tensor.

    Everything that the file says of itself is checked when it is opened, except checksums. What
    compressed-tensors wrote as bitmasks is known by the names of its parts.

    Args:
        path: of the file.

    Attributes:
        file: the safetensors file.
        ours: whether `save` wrote it.
        forms: name -> format of every tensor: of `FORMATS`, or of compressed-tensors'.
        same_as: name -> the tensor that it is tied to.
        described: entries of the state that are no plain tensors, see `state`.
        members: of each of these, the names of its tensors.
        versions: module -> version of its state, where that is not the first.
        keys: of the `state_dict`, in its order.

    Raises:
        FileFormatError: the file contradicts itself; the tensor is named.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        with without_collections():
            self._open(path)

    def _open(self, path: str | Path) -> None:
        self.file = SafetensorsFile(path)
        self.forms: dict[str, str] = {}
        self.same_as: dict[str, str] = {}
        self.described: dict[str, states.Description] = {}
        self.members: dict[str, set[str]] = {}
        self.versions: dict[str, int] = {}
        self.keys: list[str] = []
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._checksums: dict[str, int] = {}
        self._counted: dict[str, Tensor | None] = {}
        text = self.file.metadata.get(KEY)
        self.ours = text is not None
        self._parts: dict[str, dict[str, str]] = {}
        if text is None:
            self._read_foreign()
        else:
            self._read(text)
        for name, form in self.forms.items():
            if self.ours or form != "dense":
                dtype, shape = self._shapes[name]
                self._counted[name] = _ALL[form].check(name, self.parts(name), shape, dtype)

    @property
    def names(self) -> list[str]:
        """Every tensor, also tied ones and parts of entries that are no plain tensors."""
        return [*self.forms, *self.same_as]

    def dtype_and_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Of a tensor, as decoded."""
        return self._shapes[self.same_as.get(name, name)]

    def form(self, name: str) -> str:
        """Format of a tensor, tied or not."""
        return self.forms[self.same_as.get(name, name)]

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor's parts in the file; 0 for a tied one."""
        return sum(self.file.entries[key].nbytes for key in self._parts.get(name, {}).values())

    def on_meta(self) -> dict[str, Tensor]:
        """Every tensor on the meta device."""
        described = {name: self.dtype_and_shape(name) for name in self.names}
        return {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in described.items()
        }

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a tensor: views of the mapped file."""
        keys = self._parts[self.same_as.get(name, name)]
        return {part: self.file.tensor(key) for part, key in keys.items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor, dense: decoded, or a view of the mapped file where it is stored so."""
        name = self.same_as.get(name, name)
        if self.forms[name] == "dense":
            return self.parts(name)[""]
        dtype, shape = self._shapes[name]
        out = empty(shape, dtype)
        self._decode(name, out)
        return out

    def read(self, name: str, room: Tensor | None = None) -> Tensor:
        """A tensor, dense, in memory of its own; where it is stored so, nothing is mapped.

        Args:
            name: of the tensor.
            room: to be used as that memory: uint8, at least as many as the tensor has bytes.
        """
        name = self.same_as.get(name, name)
        if self.forms[name] == "dense":
            return self.file.read(self._parts[name][""], room)
        if room is None:
            return self.tensor(name)
        dtype, shape = self._shapes[name]
        out = room[: elements_of(shape) * dtype.itemsize].view(dtype).view(shape)
        self._decode(name, out)
        return out

    def ask_for(self, name: str) -> None:
        """Have the system read a tensor's parts ahead, without waiting for them."""
        for key in self._parts.get(name, {}).values():
            self.file.ask_for(key)

    def fill(self, name: str, target: Tensor) -> None:
        """Write a tensor into `target`, of its shape; decoded there where that is possible."""
        name = self.same_as.get(name, name)
        if takes(target, *self.dtype_and_shape(name)):
            self._decode(name, target.detach())
        else:
            target.detach().copy_(self.tensor(name))

    def _decode(self, name: str, out: Tensor) -> None:
        """Decode into `out`, which is of the right shape and dtype.

        Raises:
            FileFormatError: the file was changed after it was opened, so far as that is seen.
        """
        try:
            _ALL[self.forms[name]].decode(self.parts(name), self._counted.get(name), out)
        except RuntimeError as error:
            raise FileFormatError(
                f"{name}: not as it was when {self.file.path} was opened: {error}"
            ) from error

    def faults(self) -> list[str]:
        """Tensors whose bytes do not match their checksum; empty for a file without checksums."""

        def fault(name: str) -> str | None:
            found = checksum([self.file.raw(key) for key in self._parts[name].values()])
            if found == self._checksums[name]:
                return None
            return f"{name}: expected checksum {self._checksums[name]:08x}, found {found:08x}"

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return [text for text in pool.map(fault, self._checksums) if text is not None]

    def _read(self, text: str) -> None:
        path = self.file.path
        shapes = {name: (DTYPE_NAMES[e.dtype], e.shape) for name, e in self.file.entries.items()}
        if self.file.metadata.get(HEADER_CHECKSUM) != header_checksum(text, shapes):
            raise FileFormatError(f"{path}: its header does not match the header's checksum")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{path}: its metadata cannot be read: {error}") from error
        version = header.get("version") if isinstance(header, dict) else None
        if version != VERSION:
            raise FileFormatError(f"{path}: expected version {VERSION}, found {version!r}")
        for name, entry in _object(header, "tensors", path).items():
            self._read_tensor(name, entry)
        parts = {key for keys in self._parts.values() for key in keys.values()}
        for extra in self.file.entries.keys() - parts:
            raise FileFormatError(f"{extra}: belongs to no tensor that the file lists")
        for name, other in _object(header, "same_as", path).items():
            if not isinstance(other, str) or other not in self.forms or name in self.forms:
                raise FileFormatError(f"{name}: tied to {other!r}, which the file does not hold")
            self.same_as[name] = other
        self.described = _object(header, "described", path)
        self.versions = _object(header, "versions", path)
        meta = self.on_meta()
        for name, what in self.described.items():
            self.members[name] = states.check(name, what, meta)
        keys = {*self.names, *self.described} - {part for p in self.members.values() for part in p}
        self.keys = header.get("order") or list(self.forms)
        listed = isinstance(self.keys, list) and all(isinstance(key, str) for key in self.keys)
        if not listed or sorted(self.keys) != sorted(keys):
            raise FileFormatError(f"{path}: expected an order of all entries")
        if not all(type(version) is int for version in self.versions.values()):
            raise FileFormatError(f"{path}: expected versions that are integers")

    def _read_tensor(self, name: str, entry: Any) -> None:
        if not isinstance(entry, dict) or set(entry) != {"format", "dtype", "shape", "crc32"}:
            raise FileFormatError(f"{name}: expected format, dtype, shape and crc32")
        form, dtype = entry["format"], entry["dtype"]
        if not isinstance(form, str) or form not in FORMATS:
            raise FileFormatError(
                f"{name}: expected a format of {', '.join(FORMATS)}, found {form!r}"
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise FileFormatError(f"{name}: expected a dtype, found {dtype!r}")
        if type(entry["crc32"]) is not int:
            raise FileFormatError(f"{name}: expected a checksum, found {entry['crc32']!r}")
        parts = {part: part_name(name, part) for part in FORMATS[form].parts}
        if missing := sorted(key for key in parts.values() if key not in self.file.entries):
            raise FileFormatError(f"{name}: expected parts {missing} of format {form}")
        self._parts[name] = parts
        self.forms[name] = form
        self._shapes[name] = DTYPES[dtype], check_shape(name, entry["shape"])
        self._checksums[name] = entry["crc32"]

    def _read_foreign(self) -> None:
        for key in (*self.file.metadata, *self.file.entries):
            _, separator, part = key.rpartition("::")
            if key == HEADER_CHECKSUM or (separator and part in _PART_NAMES):
                raise FileFormatError(
                    f"{key}: of a compressed file, whose metadata are not in {self.file.path}"
                )
        taken: set[str] = set()
        for form, outside in OUTSIDE.items():
            for key in self.file.entries:
                prefix = key.removesuffix(".compressed")
                parts = {part: f"{prefix}.{part}" for part in outside.parts}
                whole = not taken.intersection(parts.values())
                if prefix != key and whole and self.file.entries.keys() >= set(parts.values()):
                    name = f"{prefix}.weight"
                    shape = check_shape(name, self.file.read(parts["shape"]).flatten().tolist())
                    self.forms[name], self._parts[name] = form, parts
                    self._shapes[name] = self.file.entries[key].dtype, shape
                    taken.update(parts.values())
        for name, entry in self.file.entries.items():
            if name not in taken:
                if name in self.forms:
                    raise FileFormatError(f"{name}: both dense and in parts")
                self.forms[name], self._parts[name] = "dense", {"": name}
                self._shapes[name] = entry.dtype, entry.shape
        self.keys = list(self.forms)


def takes(target: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether `target` has room for a tensor, just as that is."""
    if type(target) not in (Tensor, nn.Parameter, nn.Buffer) or target.is_quantized:
        return False
    here = target.device.type == "cpu" and target.layout == torch.strided
    return here and target.is_contiguous() and (target.dtype, tuple(target.shape)) == (dtype, shape)


def _object(header: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = header.get(key, {})
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: expected {key} to be an object")
    return found
