"""Saving a sparse model as a safetensors file that shrank, and loading it back."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fx_sparsity.storage.formats import FORMATS, FileFormatError, smallest_format

_KEY = "fx_sparsity"
_VERSION = 1


def save(model_or_state: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a model's tensors to one safetensors file, each in the format that is smallest for it.

    A tied tensor is written once. The file appears whole or not at all.

    Args:
        model_or_state: a module, or its `state_dict`. Quantized modules whose state is not made of
            tensors cannot be saved this way.
        path: overwritten.

    Raises:
        TypeError: an entry of the state is not a plain tensor; it is named.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, found {type(value).__name__}")
        if value.is_quantized or value.layout != torch.strided:
            raise TypeError(
                f"{name}: expected a strided tensor of plain numbers, found "
                f"{'a quantized one' if value.is_quantized else value.layout}"
            )
    parts: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    written: dict[tuple[Any, ...], str] = {}
    for name, original in state.items():
        # Of the tensor that the state keeps alive: a copy's address may be used again.
        place = (
            *(original.device, original.data_ptr(), original.dtype),
            *(tuple(original.shape), original.stride()),
        )
        if original.numel() and place in written:
            entries[name] = {"same_as": written[place]}
            continue
        written[place] = name
        tensor = original.detach().cpu()
        form = smallest_format(tensor)
        entries[name] = {"format": form, "shape": list(tensor.shape)}
        for part, data in FORMATS[form].encode(tensor).items():
            # A copy where the state holds a view, since a file holds no views.
            whole = data.untyped_storage().nbytes() == data.numel() * data.element_size()
            parts[_part_name(name, part)] = data if whole else data.clone()
    metadata = {_KEY: json.dumps({"version": _VERSION, "tensors": entries})}

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        save_file(parts, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read what `save` wrote, as dense tensors.

    Args:
        path: a file from `save`, or any safetensors file (its tensors are dense).
        model: loaded strictly, if given.

    Returns:
        The `state_dict`.

    Raises:
        FileFormatError: the file contradicts itself; the tensor is named.
        RuntimeError: the state does not fit `model`.
    """
    with safe_open(path, framework="pt") as file:
        metadata = (file.metadata() or {}).get(_KEY)
        if metadata is None:
            state = {name: file.get_tensor(name) for name in list(file.keys())}
        else:
            state = _decode(file, metadata, path)
    if model is not None:
        model.load_state_dict(state)
    return state


def _decode(file: Any, metadata: str, path: str | Path) -> dict[str, Tensor]:
    header = json.loads(metadata)
    if header["version"] != _VERSION:
        raise FileFormatError(f"{path}: expected version {_VERSION}, found {header['version']}")
    parts: dict[str, dict[str, str]] = {}
    for key in list(file.keys()):
        name, _, part = key.partition("::")
        parts.setdefault(name, {})[part] = key
    state: dict[str, Tensor] = {}
    for name, entry in header["tensors"].items():
        if (same := entry.get("same_as")) is not None:
            if same not in state:
                raise FileFormatError(f"{name}: tied to {same!r}, which the file does not hold")
            state[name] = state[same]
            continue
        if entry["format"] not in FORMATS:
            raise FileFormatError(
                f"{name}: expected a format of {', '.join(FORMATS)}, found {entry['format']!r}"
            )
        data = {part: file.get_tensor(key) for part, key in parts.get(name, {}).items()}
        state[name] = FORMATS[entry["format"]].decode(data, entry["shape"], name)
    return state


def _part_name(name: str, part: str) -> str:
    return f"{name}::{part}" if part else name
