"""Loading what was saved, as dense tensors, and checking it."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.kernels import PACKINGS
from fx_sparsity.storage import described_state as states
from fx_sparsity.storage.compressed_file import CompressedFile, takes
from fx_sparsity.storage.container import FileFormatError


def load(
    path: str | Path, model: nn.Module | None = None, *, check: bool = False
) -> dict[str, Any]:
    """Read what `save` wrote, as dense tensors.

    The file is mapped, not read. Dense tensors are views of the map, which is private: writing to
    them does not change the file, but a file that is cut off while it is mapped ends the process
    (SIGBUS). Into a model, tensors are decoded where its own are.

    Args:
        path: a file from `save`, or any safetensors file (its tensors are dense).
        model: loaded strictly, if given, and quantized as the one that was saved; with torchao's
            tensors it has to be given.
        check: compare every tensor with its checksum, too. The file is read into memory for that,
            once, so that what comes back is what was checked, whatever becomes of the file.

    Returns:
        The `state_dict`.

    Raises:
        FileFormatError: the file contradicts itself, or a checksum does not match; the tensor is
            named. Nothing was loaded.
        RuntimeError: the state does not fit `model`, which is as it was. A later failure, as of a
            file that is changed meanwhile, has a note that says what is loaded; call again.
        TypeError: the file holds a torchao tensor, and no model was given.
        OSError: it cannot be read.

    Examples:
        >>> model = nn.Linear(8, 4)
        >>> model.weight.data[2:] = 0
        >>> fxs.save(model, "model.safetensors")
        >>> other = nn.Linear(8, 4)
        >>> _ = fxs.load("model.safetensors", other)
        >>> torch.equal(other.weight, model.weight)
        True
    """
    file = CompressedFile(path)
    if check:
        check_sums(file)
    if model is None:
        return _state(file, {})
    targets = model.state_dict(keep_vars=True)
    check_fits(file, targets.items())
    state = _state(file, targets)
    state._metadata = getattr(targets, "_metadata", {})  # type: ignore[attr-defined]
    model.load_state_dict(state)
    return state


def faults(path: str | Path) -> list[str]:
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
    state: OrderedDict[str, Any] = OrderedDict()
    ties: dict[tuple[str, int], Any] = {}
    try:
        for name in file.keys:
            target = targets.get(name)
            tie = file.same_as.get(name, name), id(target)
            if tie not in ties:
                ties[tie] = read_entry(file, name, target)
            state[name] = ties[tie]
    except BaseException as error:
        if targets:
            error.add_note(
                f"{len(state)} of {len(file.keys)} entries are loaded, {name} in part at most; the "
                "others are as they were. The call may be repeated"
            )
        raise
    versions = {prefix: {"version": version} for prefix, version in file.versions.items()}
    state._metadata = versions  # type: ignore[attr-defined]
    return state


def read_entry(file: CompressedFile, name: str, target: Any = None) -> Any:
    """An entry of the state; where it fits `target`, it is decoded into that, and is that.

    Raises:
        TypeError: a torchao tensor without a target.
    """
    what = file.described.get(name)
    if what is None:
        if not takes(target, *file.dtype_and_shape(name)):
            return file.tensor(name)
        file.fill(name, target)
        return target
    if what["kind"] == "subclass" and target is not None:
        with torch.no_grad():
            states.fill(name, what, file.fill, target)
        return target
    return states.rebuild(name, what, file.tensor)


def check_sums(file: CompressedFile) -> None:
    """Hold a file in memory, and check it there.

    Raises:
        FileFormatError: naming every tensor that does not match its checksum.
    """
    file.file.hold()
    if faults := file.faults():
        raise FileFormatError("\n".join(faults))


def check_fits(file: CompressedFile, targets: Iterable[tuple[str, Any]]) -> None:
    """Raise `RuntimeError` unless a model can be loaded strictly.

    Args:
        file: to be loaded.
        targets: the entries of the model's state; each is let go before the next is asked for.
    """
    known, meta = set(file.keys), file.on_meta()
    seen: set[str] = set()
    missing: list[str] = []
    misfits: list[str] = []
    for name, target in targets:
        seen.add(name)
        if name not in known:
            missing.append(f"{name}: not in the file")
        elif (misfit := _misfit(file, name, meta, target)) is not None:
            misfits.append(misfit)
    beyond = [name for name in file.keys if name not in seen]
    more = [f"{name}: not in the model" for name in beyond]
    if faults := [*missing, *more, *misfits]:
        packed = {part for packing in PACKINGS.values() for part in packing.parts}
        if missing and packed.intersection(name.rpartition(".")[2] for name in beyond):
            faults.append(
                "The file is of a lowered model. Lower this one alike before loading it, or save "
                "what unlower(model) gives"
            )
        raise RuntimeError(f"{file.file.path} does not fit the model:\n" + "\n".join(faults))


def _misfit(file: CompressedFile, name: str, meta: Mapping[str, Tensor], target: Any) -> str | None:
    """Why an entry cannot take the place of `target`, or None; plain tensors may be cast."""
    if (what := file.described.get(name)) is not None:
        return states.misfit(name, what, meta, target)
    if not states.is_plain(target):
        return f"{name}: expected a plain tensor in the model, found {states.kind_of(target)}"
    if target.shape != meta[name].shape:
        return f"{name}: expected shape {tuple(target.shape)}, found {tuple(meta[name].shape)}"
    return None
