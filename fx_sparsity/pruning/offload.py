"""Activations in files: mapped into memory, whose pages are the system's to take back."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Keep = Callable[[Any], Any]
"""A tree of tensors that are needed later -> the same, wherever they are kept until then."""
_LEAST = 4096  # bytes of a tree: what is smaller stays in memory
_ALIGNMENT = 64


def in_memory(tree: Any) -> Any:
    """The very same."""
    return tree


def offload_to(folder: str | os.PathLike[str] | None) -> Keep:
    """Keeps tensors in files of a folder; in memory for None.

    The files have no names any more once they are mapped: they are gone with the tensors, or with
    the process.

    Raises:
        NotADirectoryError: it is no folder.
    """
    if folder is None:
        return in_memory
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"offload: expected a folder, found {os.fspath(folder)!r}")
    return lambda tree: _offloaded(tree, Path(folder))


def _offloaded(tree: Any, folder: Path) -> Any:
    """A tree with its tensors in one new file, but for those that are in one already.

    Tensors that share memory still do.
    """
    leaves, spec = pytree.tree_flatten(tree)
    storages = {
        storage._cdata: storage
        for leaf in leaves
        if type(leaf) is Tensor and leaf.layout == torch.strided and leaf.device.type == "cpu"
        if (storage := leaf.untyped_storage()).filename is None
    }
    places, size = {}, 0
    for key, storage in storages.items():
        places[key] = size
        size += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
    if size < _LEAST:
        return tree
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(size)
        whole = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
    for key, storage in storages.items():
        old = torch.empty(0, dtype=torch.uint8).set_(storage)
        whole[places[key] : places[key] + len(old)] = old
    mapped = whole.untyped_storage()
    return pytree.tree_unflatten([_moved(leaf, places, mapped) for leaf in leaves], spec)


def _moved(leaf: Any, places: dict[int, int], mapped: torch.UntypedStorage) -> Any:
    if type(leaf) is not Tensor or leaf.layout != torch.strided:
        return leaf
    place = places.get(leaf.untyped_storage()._cdata)
    if place is None:
        return leaf
    offset = place // leaf.element_size() + leaf.storage_offset()
    found = torch.empty(0, dtype=leaf.dtype).set_(mapped, offset, leaf.shape, leaf.stride())
    return found.requires_grad_(leaf.requires_grad)
