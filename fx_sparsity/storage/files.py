"""Saving a sparse model as a safetensors file that shrank, and loading it back."""

import contextlib
import json
import mmap
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fx_sparsity.storage import state as states
from fx_sparsity.storage.compressed_tensors import OUTSIDE, outside_name
from fx_sparsity.storage.container import (
    DTYPE_NAMES,
    DTYPES,
    FileFormatError,
    SafetensorsFile,
    SafetensorsWriter,
    bytes_of,
    check_shape,
    checksum,
    elements_of,
    replacing,
)
from fx_sparsity.storage.formats import FORMATS, Contents, Format, sizes

_KEY = "fx_sparsity"
_HEADER_CHECKSUM = "fx_sparsity_checksum"
_VERSION = 2
_ALL: dict[str, Format] = {**FORMATS, **OUTSIDE}
_PART_NAMES = {part for form in FORMATS.values() for part in form.parts if part}
_LARGE = 1 << 22  # bytes from which memory is asked for in huge pages


def save(
    model_or_state: nn.Module | Mapping[str, Any], path: str | Path, *, form: str | None = None
) -> None:
    """Write a model's tensors to one safetensors file, each in the format that is smallest for it.

    A tied tensor is written once. Each tensor has a checksum. The file appears whole or not at
    all, whatever happens meanwhile. One encoded tensor is in memory at a time.

    Args:
        model_or_state: a module, or its `state_dict`. Quantized modules of `torch.ao` and torchao's
            tensors are taken apart into codes, scales and zero points.
        path: overwritten.
        form: of every tensor that can take it, the others being dense; a name in `FORMATS`.

    Raises:
        TypeError: an entry of the state cannot be stored; it is named.
        ValueError: unknown `form`.
    """
    if form is not None and form not in FORMATS:
        raise ValueError(f"form: expected one of {', '.join(FORMATS)}, found {form!r}")
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    tensors, described = states.flatten(state)
    check_dtypes(tensors)
    ties = _ties(tensors)
    extra = {
        "described": described,
        "same_as": ties,
        "versions": _versions(state),
        "order": list(state) if described or ties else [],
    }
    with replacing(path) as file:
        writer = CompressedWriter(file, _shapes(tensors), form, extra)
        for name, tensor in tensors.items():
            if name not in ties:
                writer.write(writer.encode(name, tensor.detach().cpu()))
        writer.finish()


def export(
    model_or_state: nn.Module | Mapping[str, Tensor], path: str | Path, *, layout: str = "dense"
) -> None:
    """Write a model's tensors to a safetensors file that other runtimes read.

    Args:
        model_or_state: a module, or its `state_dict`; plain tensors only. Of tied ones the first is
            written.
        path: overwritten. `config.json` beside it, made if it is not there, gets what a sparse
            layout needs: `quantization_config`, with its `sparsity_config`.
        layout: `"dense"`, which everything reads, or one of compressed-tensors: `"sparse-bitmask"`
            and `"sparse-24-bitmask"`. These hold matrices called `weight`; the rest is dense.

    Raises:
        TypeError: an entry that is no plain tensor; it is named.
        ValueError: unknown `layout`.
    """
    check_layout(layout, (*OUTSIDE, "dense"))
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    tensors, described = states.flatten(state)
    for name in described:
        raise TypeError(f"{name}: expected a strided tensor of plain numbers; `save` stores it")
    check_dtypes(tensors)
    ties = _ties(tensors)
    counts = Counts()
    with replacing(path) as file:
        writer = PlainWriter(file, _shapes(tensors), layout)
        for name, tensor in tensors.items():
            if name not in ties:
                encoded = writer.encode(name, tensor.detach().cpu())
                writer.write(encoded)
                counts.add(encoded)
        writer.finish()
    if layout != "dense":
        config = Path(path).with_name("config.json")
        found = json.loads(config.read_text()) if config.exists() else {}
        with replacing(config) as file:
            file.write(json.dumps(counts.configured(found, layout), indent=2).encode())


def check_layout(layout: str, known: Iterable[str]) -> None:
    """Raise `ValueError` for an unknown layout."""
    if layout not in known:
        raise ValueError(f"layout: expected one of {', '.join(known)}, found {layout!r}")


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raise `TypeError` for a tensor of a dtype that safetensors does not have."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name}: safetensors has no dtype for {tensor.dtype}")


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


class PlainWriter:
    """Writes tensors one after another for other runtimes: dense, or as compressed-tensors does.

    Args:
        file: open for writing, empty.
        shapes: name -> shape of all tensors that may come.
        layout: `"dense"`, `"sparse-bitmask"` or `"sparse-24-bitmask"`.
        metadata: of the file.
    """

    def __init__(
        self,
        file: BinaryIO,
        shapes: Mapping[str, Sequence[int]],
        layout: str = "dense",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._layout = layout
        self._metadata = {"format": "pt"} if metadata is None else metadata
        room = len(json.dumps(self._metadata)) + _room(shapes)
        self._writer = SafetensorsWriter(file, room)

    def encode(self, name: str, tensor: Tensor) -> Encoded:
        """One CPU tensor as it will be written."""
        shape, form = tuple(tensor.shape), FORMATS["dense"]
        parts: Mapping[str, Tensor] = {name: tensor.contiguous()}
        if self._layout != "dense" and name.endswith(".weight") and not tensor.is_complex():
            contents, form = Contents(tensor), OUTSIDE[self._layout]
            size = form.size(contents)
            if size is not None and size < contents.nbytes:
                zeros = tensor.numel() - contents.found[1]
                encoded = form.encode(contents)
                parts = {outside_name(name, part): data for part, data in encoded.items()}
                return Encoded(name, self._layout, tensor.dtype, shape, parts, zeros)
        return Encoded(name, "dense", tensor.dtype, shape, parts)

    def write(self, encoded: Encoded) -> None:
        """Write a tensor. Raises `ValueError` for a name that is taken."""
        for name, part in encoded.parts.items():
            self._writer.add(name, part)

    def finish(self) -> None:
        """Write what is left, and the header."""
        self._writer.finish(self._metadata)


class CompressedWriter:
    """Writes tensors one after another, each in the smallest format or a given one.

    Args:
        file: open for writing, empty.
        shapes: name -> shape of all tensors that may come.
        form: of every tensor that can take it, the others being dense.
        extra: further metadata, for JSON.
    """

    def __init__(
        self,
        file: BinaryIO,
        shapes: Mapping[str, Sequence[int]],
        form: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._form = form
        self._extra = {key: value for key, value in (extra or {}).items() if value}
        room = len(json.dumps(json.dumps(self._extra))) + _room(shapes)
        self._writer = SafetensorsWriter(file, room)
        self._tensors: dict[str, Any] = {}

    def encode(self, name: str, tensor: Tensor) -> Encoded:
        """One CPU tensor as it will be written."""
        contents = Contents(tensor)
        found = sizes(contents)
        form = self._form
        if form is None:
            form = min(found, key=lambda name: found[name])
        elif form not in found:
            form = "dense"
        encoded = FORMATS[form].encode(contents)
        parts = {part_name(name, part): encoded[part] for part in FORMATS[form].parts}
        zeros = None if tensor.is_complex() else tensor.numel() - contents.found[1]
        return Encoded(name, form, tensor.dtype, contents.shape, parts, zeros)

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
        text = json.dumps({"version": _VERSION, "tensors": self._tensors, **self._extra})
        header = {
            name: (entry["dtype"], tuple(entry["shape"]))
            for name, entry in self._writer.header().items()
        }
        self._writer.finish({_KEY: text, _HEADER_CHECKSUM: _header_checksum(text, header)})


@dataclass
class Counts:
    """What a sparse layout's configuration says of the tensors that were written.

    Attributes:
        sparse, dense: modules whose weight is in the layout, and whose matrix is not.
        zeros, elements: of the former.
    """

    sparse: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    zeros: int = 0
    elements: int = 0

    def add(self, encoded: Encoded) -> None:
        """Count a tensor."""
        module = encoded.name.removesuffix(".weight")
        if encoded.form != "dense":
            self.sparse.append(module)
            self.zeros += encoded.zeros or 0
            self.elements += elements_of(encoded.shape)
        elif module != encoded.name and len(encoded.shape) == 2:
            self.dense.append(module)

    def merge(self, other: "Counts") -> None:
        """Count what another one counted."""
        self.sparse += other.sparse
        self.dense += other.dense
        self.zeros += other.zeros
        self.elements += other.elements

    def configured(self, config: Mapping[str, Any], layout: str) -> dict[str, Any]:
        """A model's `config.json` with what compressed-tensors looks for."""
        sparsity = {
            "format": layout,
            "global_sparsity": self.zeros / self.elements if self.elements else 0.0,
            "ignore": self.dense,
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4" if layout == "sparse-24-bitmask" else "unstructured",
            "targets": self.sparse,
        }
        quantization = dict(config.get("quantization_config") or {})
        quantization.setdefault("quant_method", "compressed-tensors")
        quantization["sparsity_config"] = sparsity
        return {**config, "quantization_config": quantization}


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
        versions: module -> version of its state, where that is not the first.
        keys: of the `state_dict`, in its order.

    Raises:
        FileFormatError: the file contradicts itself; the tensor is named.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = SafetensorsFile(path)
        self.forms: dict[str, str] = {}
        self.same_as: dict[str, str] = {}
        self.described: dict[str, states.Description] = {}
        self.versions: dict[str, int] = {}
        self.keys: list[str] = []
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._checksums: dict[str, int] = {}
        text = self.file.metadata.get(_KEY)
        self.ours = text is not None
        self._parts: dict[str, dict[str, str]] = {}
        if text is None:
            self._read_foreign()
        else:
            self._read(text)
        for name, form in self.forms.items():
            if self.ours or form != "dense":
                dtype, shape = self._shapes[name]
                _ALL[form].check(name, self.parts(name), shape, dtype)

    @property
    def names(self) -> list[str]:
        """Every tensor, also tied ones and parts of entries that are no plain tensors."""
        return [*self.forms, *self.same_as]

    def dtype_and_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Of a tensor, as decoded."""
        return self._shapes[self.same_as.get(name, name)]

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
        parts = self.parts(name)
        if self.forms[name] == "dense":
            return parts[""]
        dtype, shape = self._shapes[name]
        out = _empty(shape, dtype)
        _ALL[self.forms[name]].decode(parts, out)
        return out

    def read(self, name: str) -> Tensor:
        """A tensor, dense, in memory of its own; where it is stored so, nothing is mapped."""
        name = self.same_as.get(name, name)
        if self.forms[name] == "dense":
            return self.file.read(self._parts[name][""])
        return self.tensor(name)

    def fill(self, name: str, target: Tensor) -> None:
        """Write a tensor into `target`, of its shape; decoded there where that is possible."""
        name = self.same_as.get(name, name)
        if _takes(target, *self.dtype_and_shape(name)):
            _ALL[self.forms[name]].decode(self.parts(name), target.detach())
        else:
            target.detach().copy_(self.tensor(name))

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
        if self.file.metadata.get(_HEADER_CHECKSUM) != _header_checksum(text, shapes):
            raise FileFormatError(f"{path}: its header does not match the header's checksum")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{path}: its metadata cannot be read: {error}") from error
        version = header.get("version") if isinstance(header, dict) else None
        if version != _VERSION:
            raise FileFormatError(f"{path}: expected version {_VERSION}, found {version!r}")
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
        meta, taken = self.on_meta(), set()
        for name, what in self.described.items():
            taken |= states.check(name, what, meta)
        keys = {*self.names, *self.described} - taken
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
        if missing := set(parts.values()) - self.file.entries.keys():
            raise FileFormatError(f"{name}: expected parts {sorted(missing)} of format {form}")
        self._parts[name] = parts
        self.forms[name] = form
        self._shapes[name] = DTYPES[dtype], check_shape(name, entry["shape"])
        self._checksums[name] = entry["crc32"]

    def _read_foreign(self) -> None:
        for key in (*self.file.metadata, *self.file.entries):
            _, separator, part = key.rpartition("::")
            if key == _HEADER_CHECKSUM or (separator and part in _PART_NAMES):
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


def load(
    path: str | Path, model: nn.Module | None = None, *, check: bool = False
) -> dict[str, Any]:
    """Read what `save` wrote, as dense tensors.

    The file is mapped, not read. Dense tensors are views of the map, which is private: writing to
    them does not change the file. Into a model, tensors are decoded where its own are.

    Args:
        path: a file from `save`, or any safetensors file (its tensors are dense).
        model: loaded strictly, if given; with torchao's tensors it has to be given.
        check: compare every tensor with its checksum, too.

    Returns:
        The `state_dict`.

    Raises:
        FileFormatError: the file contradicts itself, or a checksum does not match; the tensor is
            named. Nothing was loaded.
        RuntimeError: the state does not fit `model`, which is as it was.
        TypeError: the file holds a torchao tensor, and no model was given.
        OSError: it cannot be read.
    """
    file = CompressedFile(path)
    if check:
        check_sums(file)
    if model is None:
        return _state(file, {})
    targets = model.state_dict(keep_vars=True)
    check_fits(file, targets)
    state = _state(file, targets)
    state._metadata = getattr(targets, "_metadata", {})  # type: ignore[attr-defined]
    model.load_state_dict(state)
    return state


def verify(path: str | Path) -> list[str]:
    """What is wrong with a file: a sentence that names the tensor for every fault, or nothing.

    Checks its structure and, where `save` wrote it, every checksum.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        return CompressedFile(path).faults()
    except FileFormatError as error:
        return [str(error)]


def _state(file: CompressedFile, targets: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """All entries; those that fit a tensor of `targets` are decoded into it, and are that."""
    tensors: dict[str, Any] = {}
    for name in file.forms:
        target: Any = targets.get(name)
        if _takes(target, *file.dtype_and_shape(name)):
            file.fill(name, target)
            tensors[name] = target
        else:
            tensors[name] = file.tensor(name)
    for name, other in file.same_as.items():
        tied = name in targets and targets[name] is targets.get(other)
        tensors[name] = targets[name] if tied else tensors[other]
    for name, what in file.described.items():
        if what["kind"] == "subclass" and name in targets:
            with torch.no_grad():
                states.fill(name, what, tensors, targets[name])
            tensors[name] = targets[name]
        else:
            tensors[name] = states.rebuild(name, what, tensors)
    state = OrderedDict((name, tensors[name]) for name in file.keys)
    versions = {prefix: {"version": version} for prefix, version in file.versions.items()}
    state._metadata = versions  # type: ignore[attr-defined]
    return state


def check_sums(file: CompressedFile) -> None:
    """Raise `FileFormatError` naming every tensor that does not match its checksum."""
    if faults := file.faults():
        raise FileFormatError("\n".join(faults))


def check_fits(file: CompressedFile, targets: Mapping[str, Any]) -> None:
    """Raise `RuntimeError` unless a model whose state is `targets` can be loaded strictly."""
    faults = [f"{name}: not in the file" for name in targets if name not in set(file.keys)]
    faults += [f"{name}: not in the model" for name in file.keys if name not in targets]
    meta = file.on_meta()
    for name in file.keys:
        target, what = targets.get(name), file.described.get(name)
        if what is not None and what["kind"] == "subclass":
            if target is not None and (why := states.misfit(name, what, meta, target)):
                faults.append(why)
        elif what is None and isinstance(target, Tensor) and target.shape != meta[name].shape:
            found = tuple(meta[name].shape)
            faults.append(f"{name}: expected shape {tuple(target.shape)}, found {found}")
    if faults:
        raise RuntimeError(f"{file.file.path} does not fit the model:\n" + "\n".join(faults))


def _takes(target: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether `target` has room for a tensor, just as that is."""
    if type(target) not in (Tensor, nn.Parameter, nn.Buffer) or target.is_quantized:
        return False
    here = target.device.type == "cpu" and target.layout == torch.strided
    return here and target.is_contiguous() and (target.dtype, tuple(target.shape)) == (dtype, shape)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like `torch.empty`; large ones in huge pages, which take less time to touch first."""
    nbytes = elements_of(shape) * dtype.itemsize
    if nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _room(shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes that a header needs at most.

    For each tensor: up to four entries in the header, with offsets of up to 15 digits, or two and
    one in the metadata, whose quotes are escaped twice.
    """
    names = sum(4 * len(json.dumps(json.dumps(json.dumps(name)))) for name in shapes)
    return 256 + names + sum(400 + 3 * len(str(tuple(shape))) for shape in shapes.values())


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> an earlier one that is the same elements of the same memory."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in tensors.items():
        # Of the tensor that the state keeps alive: a copy's address may be used again.
        place = (
            *(tensor.device, tensor.data_ptr(), tensor.dtype),
            *(tuple(tensor.shape), tensor.stride()),
        )
        if tensor.numel() and first.setdefault(place, name) != name:
            ties[name] = first[place]
    return ties


def _versions(state: Mapping[str, Any]) -> dict[str, int]:
    """Versions of modules that state themselves otherwise than their first version did."""
    metadata = getattr(state, "_metadata", {})
    return {p: m["version"] for p, m in metadata.items() if (m.get("version") or 1) > 1}


def _object(header: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = header.get(key, {})
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: expected {key} to be an object")
    return found


def _header_checksum(text: str, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """CRC-32 of everything that a header says, in hexadecimal."""
    listed = sorted((name, dtype, list(shape)) for name, (dtype, shape) in entries.items())
    return f"{zlib.crc32(json.dumps([text, listed]).encode()):08x}"


def part_name(name: str, part: str) -> str:
    """What a part of a tensor is called in a file."""
    return f"{name}::{part}" if part else name
