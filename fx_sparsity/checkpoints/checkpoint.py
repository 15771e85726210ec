"""Checkpoints as model hubs publish them: folders of safetensors files, without a model.

One file, or several shards with an index that says which tensor is where; configuration and
tokenizer beside them.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fx_sparsity.checkpoints.names import tied_names
from fx_sparsity.errors import FxSparsityError
from fx_sparsity.storage.compressed_file import CompressedFile
from fx_sparsity.storage.container import FileFormatError
from fx_sparsity.storage.json_files import read_json

CONFIG = "config.json"
"""Name of the model's configuration."""
_INDEX = ".safetensors.index.json"  # how its name ends
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"})


class CheckpointError(FxSparsityError, ValueError):
    """A checkpoint cannot be read or written as asked, or does not fit the model."""


class Checkpoint:
    """The safetensors files of a folder, or one file, and which tensor is in which.

    Args:
        path: one file, or a folder: its shards are those that its index names, else all
            safetensors files in it.

    Attributes:
        folder: that holds the files.
        is_folder: whether the whole folder is meant.
        shards: names of the safetensors files.
        index: name of the index, JSON whose `weight_map` is name -> file; None where there is none.
        others: names of the files beside them, in subfolders too.
        skipped: what is left behind: files with weights that are none of this checkpoint, as in
            other formats; folders that are links, which are not followed; links to nothing.

    Raises:
        CheckpointError: an index that does not fit the files.
        FileFormatError: a file contradicts itself, or there are several indices.
        FileNotFoundError: no safetensors file, or none that the index names.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.is_folder = not path.is_file()
        self.folder = path if self.is_folder else path.parent
        self.shards = [path.name]
        self.index: str | None = None
        self.others: list[str] = []
        self.skipped: list[str] = []
        if self.is_folder:
            self._read_folder(sorted(entry.name for entry in path.iterdir()))

    @cached_property
    def files(self) -> dict[str, CompressedFile]:
        """Shard -> what it holds."""
        return {shard: CompressedFile(self.folder / shard) for shard in self.shards}

    @cached_property
    def where(self) -> dict[str, str]:
        """Tensor -> the shard that holds it, in the order of shards and of the tensors in them.

        Raises:
            CheckpointError: a tensor in two shards, which no index tells apart.
        """
        where: dict[str, str] = {}
        for shard, file in self.files.items():
            for name in file.names:
                if name in where:
                    raise CheckpointError(f"{name}: in {where[name]} and in {shard}")
                where[name] = shard
        return where

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`; empty where there is none.

        Raises:
            FileFormatError: it is no JSON object.
        """
        path = self.folder / CONFIG
        return read_json(path) if self.is_folder and path.exists() else {}

    @cached_property
    def ties(self) -> dict[str, str]:
        """Name -> the tensor that it is tied to, as the files or the configuration say."""
        inside = {n: other for file in self.files.values() for n, other in file.same_as.items()}
        return {**tied_names(self.config, self.where), **inside}

    @property
    def nbytes(self) -> int:
        """Of all shards."""
        return sum(file.file.nbytes for file in self.files.values())

    def read(self, name: str) -> Tensor:
        """One tensor, dense, in memory of its own."""
        return self.files[self.where[name]].read(name)

    def _read_folder(self, names: Sequence[str]) -> None:
        indices = [name for name in names if name.endswith(_INDEX)]
        if len(indices) > 1:
            raise FileFormatError(f"{self.folder}: expected one index, found {', '.join(indices)}")
        self.index = next(iter(indices), None)
        self.shards = [name for name in names if name.endswith(".safetensors")]
        index = None
        if self.index is not None:
            index = _read_index(self.folder / self.index)
            self.shards = sorted(set(index.values()))
            if absent := [shard for shard in self.shards if shard not in names]:
                raise FileNotFoundError(f"{self.folder / absent[0]}, which {self.index} names")
        if not self.shards:
            raise FileNotFoundError(f"{self.folder}: expected safetensors files, found none")
        self._read_others()
        if index is not None:
            self._check_index(index)

    def _read_others(self) -> None:
        """Sort what is beside the shards, also in folders, such as a sentence encoder's pooling."""
        mine = {*self.shards, self.index}
        for root, folders, files in os.walk(self.folder):  # which follows no links
            linked = [name for name in folders if Path(root, name).is_symlink()]
            for path in (Path(root, name) for name in (*files, *linked)):
                found = str(path.relative_to(self.folder))
                if found in mine:
                    continue
                left = not path.is_file() or path.suffix in _WEIGHTS
                (self.skipped if left else self.others).append(found)
        self.others.sort()
        self.skipped.sort()

    def _check_index(self, index: Mapping[str, str]) -> None:
        held = {key: s for s, file in self.files.items() for key in file.file.entries}
        for name in index.keys() | held.keys():
            says, is_in = index.get(name), held.get(name)
            if says != is_in:
                raise CheckpointError(
                    f"{name}: {self.index} says it is in {says}, it is in {is_in or 'no file'}"
                )


def _read_index(path: Path) -> dict[str, str]:
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in found.values()
    ):
        raise FileFormatError(
            f"{path}: expected a JSON object whose weight_map is name -> file in this directory"
        )
    return found
