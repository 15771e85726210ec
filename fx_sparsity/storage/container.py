"""The safetensors container: reading through a memory map, and writing one tensor after another.

https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the header
(tensor -> dtype, shape, offsets; `__metadata__` holds strings), and the tensors without gaps.
"""

import contextlib
import ctypes
import gc
import glob
import json
import mmap
import os
import secrets
import stat
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.storage.locks import is_at_work, try_lock

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in the file -> dtype."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_ALIGNMENT = 8
_WRITTEN = 1 << 20  # bytes at a time
_MOST_READ = 1 << 30  # bytes at a time; Linux reads no more than 2 GiB


class FileFormatError(FxSparsityError, ValueError):
    """A file's content does not fit what it declares; names the tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype, shape and place (first byte of the file, bytes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """A safetensors file, checked as a whole when opened; its tensors are views of a memory map.

    The map is private: tensors may be written to, the file never is. Whoever cuts a file off while
    it is mapped ends the process that reads there (SIGBUS); `hold` it where that may be.

    Args:
        path: of the file.

    Attributes:
        path: as given.
        entries: name -> `Entry`, in the order of their places.
        metadata: what `__metadata__` holds.
        header_bytes: where the tensors begin.
        nbytes: of the file.

    Raises:
        FileFormatError: not a safetensors file, or it contradicts itself.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb", buffering=0) as file, without_collections():
            layout = read_layout(file, str(path))
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.entries, self.metadata = layout.entries, layout.metadata
        self.header_bytes, self.nbytes = layout.header_bytes, layout.nbytes

    @cached_property
    def _map(self) -> mmap.mmap | bytearray:
        return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)

    def hold(self) -> None:
        """Have tensors from now on be views of a copy in memory, which no one else can change.

        Raises:
            FileFormatError: the file got shorter meanwhile.
        """
        held = bytearray(self.nbytes)
        self._fill(memoryview(held), 0, str(self.path))
        self._map = held

    def read(self, name: str, room: Tensor | None = None) -> Tensor:
        """One tensor, read into memory of its own, or into `room`; nothing is mapped.

        Args:
            name: of the tensor.
            room: uint8, at least as many as the tensor has bytes.

        Raises:
            FileFormatError: the file got shorter meanwhile.
        """
        entry = self.entries[name]
        if room is None:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
        else:
            tensor = room[: entry.nbytes].view(entry.dtype).view(entry.shape)
        self._fill(bytes_of(tensor), entry.start, name)
        return tensor

    def _fill(self, into: memoryview, place: int, name: str) -> None:
        """Read bytes from a place on, until `into` is full."""
        while into:
            count = os.preadv(self._descriptor, [into[:_MOST_READ]], place)
            if not count:
                raise FileFormatError(f"{name}: the file ends at byte {place}")
            into, place = into[count:], place + count

    def ask_for(self, name: str) -> None:
        """Have the system read a tensor's bytes ahead, where it can, without waiting for them."""
        entry = self.entries[name]
        if hasattr(os, "posix_fadvise"):
            advice = os.POSIX_FADV_WILLNEED
            os.posix_fadvise(self._descriptor, entry.start, entry.nbytes, advice)

    def tensor(self, name: str) -> Tensor:
        """One tensor, contiguous: a view of the map, or a copy where the file does not align it."""
        entry = self.entries[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = torch.frombuffer(
            self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.start
        )
        if entry.start % entry.dtype.itemsize:
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.start : entry.start + entry.nbytes]


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection meanwhile: what a header says stays, and torch's objects are many."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Layout:
    """What a header says, once it is sure that it fits the file; see `SafetensorsFile`."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    header_bytes: int
    nbytes: int


def read_layout(file: IO[bytes], path: str) -> Layout:
    """Read and check the header of a safetensors file.

    Args:
        file: open for reading, at its beginning.
        path: for messages.

    Raises:
        FileFormatError: the header contradicts itself or the file's length.
    """
    nbytes = os.fstat(file.fileno()).st_size
    start, header = _read_header(file, nbytes, path)
    metadata = _read_metadata(header.pop("__metadata__", {}), path)
    return Layout(_read_entries(header, start, nbytes, path), metadata, start, nbytes)


def _read_header(file: IO[bytes], nbytes: int, path: str) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(file.read(8), "little")
    if nbytes < 10 or not 2 <= length <= min(nbytes - 8, _LONGEST_HEADER):
        raise FileFormatError(
            f"{path}: not a safetensors file: expected a header of 2 to "
            f"{max(0, min(nbytes - 8, _LONGEST_HEADER))} bytes, found {length}"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: expected a header that is an object")
    return 8 + length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise FileFormatError(f"{name}: listed twice")
    return found


def _read_metadata(metadata: Any, path: str) -> dict[str, str]:
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not strings:
        raise FileFormatError(f"{path}: expected metadata of strings")
    return metadata


def _read_entries(header: dict[str, Any], start: int, nbytes: int, path: str) -> dict[str, Entry]:
    entries = {name: _read_entry(name, entry, start) for name, entry in header.items()}
    place = start
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    for name, entry in ordered.items():
        if entry.start != place:
            raise FileFormatError(
                f"{name}: expected to start at byte {place - start}, found {entry.start - start}"
            )
        place += entry.nbytes
    if place != nbytes:
        last = next(reversed(ordered), path)
        raise FileFormatError(
            f"{last}: expected the file to end after {place} bytes, found {nbytes}"
        )
    return ordered


def _read_entry(name: str, entry: Any, start: int) -> Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"{name}: expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FileFormatError(
            f"{name}: expected a dtype of {', '.join(DTYPES)}, found {entry['dtype']!r}"
        )
    shape = check_shape(name, entry["shape"])
    offsets = entry["data_offsets"]
    if not is_integers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        raise FileFormatError(f"{name}: expected two offsets, found {offsets!r}")
    wanted = elements_of(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != wanted:
        raise FileFormatError(
            f"{name}: expected {wanted} bytes for {entry['dtype']} of shape {shape}, "
            f"found {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, shape, start + offsets[0], wanted)


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """`shape` as a tuple, once it is sure that torch can make a tensor of it.

    Raises:
        FileFormatError: no list of sizes, or far too large a tensor.
    """
    if not is_integers(shape) or len(shape) > 64 or any(size < 0 for size in shape):
        raise FileFormatError(f"{name}: expected a shape, found {str(shape)[:80]}")
    # Strides are products of the sizes without zeros.
    if elements_of([max(1, size) for size in shape]) >= 1 << 56:
        raise FileFormatError(f"{name}: expected a shape that fits into memory, found {shape}")
    return tuple(shape)


def is_integers(value: Any) -> TypeGuard[list[int]]:
    """Whether `value`, from JSON, is a list of integers."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def elements_of(shape: Sequence[int]) -> int:
    """How many elements a tensor of `shape` has; exact however many."""
    elements = 1
    for size in shape:
        elements *= size
    return elements


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied; valid as long as the tensor lives."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class SafetensorsWriter:
    """Writes a safetensors file one tensor after another, so that only one need be in memory.

    The header is written last, into room left for it. Tensors that take no multiple of eight bytes
    go to the end, so that all are aligned.

    Args:
        file: open for writing, empty.
        room: bytes for the header.
    """

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file = file
        self._room = min(-(-room // _ALIGNMENT) * _ALIGNMENT, _LONGEST_HEADER)  # or nobody reads it
        self._entries: dict[str, dict[str, Any]] = {}
        self._place = 0
        self._late: list[tuple[str, Tensor]] = []
        file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one contiguous CPU tensor; a copy is kept until `finish` if it is of odd size.

        Raises:
            ValueError: a name that is taken.
            TypeError: a dtype that safetensors does not have.
        """
        if name in self._entries:
            raise ValueError(f"{name}: the file has a tensor of this name already")
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name}: safetensors has no dtype for {tensor.dtype}")
        self._entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        if tensor.nbytes % _ALIGNMENT:
            self._late.append((name, tensor.clone()))
        else:
            self._write(name, tensor)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what was kept back, and the header.

        Raises:
            ValueError: the header needs more room than there is.
        """
        for name, tensor in sorted(self._late, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = {"__metadata__": dict(metadata)} if metadata else {}
        text = json.dumps({**header, **self._entries}, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise ValueError(
                f"a header of {len(text)} bytes in a room of {self._room}; write shards"
            )
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))

    def header(self) -> dict[str, dict[str, Any]]:
        """Name -> dtype and shape of every tensor so far."""
        return self._entries

    def _write(self, name: str, tensor: Tensor) -> None:
        data = bytes_of(tensor)
        # In one call, Linux takes page cache in large blocks, whose making can take far longer.
        for start in range(0, len(data), _WRITTEN):
            self._file.write(data[start : start + _WRITTEN])
        self._entries[name]["data_offsets"] = [self._place, self._place + tensor.nbytes]
        self._place += tensor.nbytes


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end, whole; after an error, not at all.

    It is written under a temporary name in the same folder, `.NAME.*.part`, and synced before it
    is renamed, and its folder after. So a crash at any moment leaves the old file or the new one.
    What a killed process has left is removed, and a file that is replaced keeps its permissions.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        of_another = "." in left.name.removeprefix(f".{path.name}.").removesuffix(".part")
        if not of_another and not is_at_work(left):
            left.unlink(missing_ok=True)
    temporary, part = _create_part(path)
    try:
        with part as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while it is locked
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _create_part(path: Path) -> tuple[Path, BinaryIO]:
    """A new file under a temporary name, locked, with the permissions of `path` if there is one."""
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb")  # noqa: SIM115
        if mode is not None:
            temporary.chmod(mode)  # what the umask took away
        locked = True
        with contextlib.suppress(OSError):
            locked = try_lock(file.fileno())
        if locked and temporary.exists():
            return temporary, file
        file.close()  # another process took it for one that was left, before it was locked


def sync_folder(folder: Path) -> None:
    """Make sure that what was renamed in `folder` stays so; not every system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(parts: Sequence[memoryview]) -> int:
    """CRC-32 of some bytes, one part after the other."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value
