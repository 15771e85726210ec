"""Loading what was saved, as dense tensors, and checking it."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.storage import state as states
from fx_sparsity.storage.compressed_file import CompressedFile, takes
from fx_sparsity.storage.container import FileFormatError


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
        if takes(target, *file.dtype_and_shape(name)):
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
