"""Checkpoints as model hubs publish them: folders of safetensors files, without a model.

One file, or several shards with an index that says which tensor is where; configuration and
tokenizer beside them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph import WeightMap, WeightSite
from fx_sparsity.graph.weight_map import DenseParameter, Reason
from fx_sparsity.patterns import Role
from fx_sparsity.storage.compressed_file import CompressedFile
from fx_sparsity.storage.container import FileFormatError

_INDEX = ".safetensors.index.json"  # how its name ends
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"})
_EMBEDDING = re.compile(r"(?:.*[._])?(?:\w*embed\w*|wte|wpe)(?:[._].*)?", re.IGNORECASE)

Roles = Mapping[str, Sequence[Role]]
"""Regular expression over names -> roles of the axes; the first that matches from the start."""


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
        skipped: names of files with weights that are none of this checkpoint, as in other formats.

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
        for name in names:  # also those in folders, such as the pooling of a sentence encoder
            entry = self.folder / name
            for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
                found = str(path.relative_to(self.folder))
                if path.is_file() and found not in (*self.shards, self.index):
                    (self.skipped if path.suffix in _WEIGHTS else self.others).append(found)
        if index is not None:
            self._check_index(index)

    def _check_index(self, index: Mapping[str, str]) -> None:
        held = {key: s for s, file in self.files.items() for key in file.file.entries}
        for name in index.keys() | held.keys():
            says, is_in = index.get(name), held.get(name)
            if says != is_in:
                raise CheckpointError(
                    f"{name}: {self.index} says it is in {says}, it is in {is_in or 'no file'}"
                )


def _read_index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())["weight_map"]
        assert all(isinstance(name, str) and Path(name).name == name for name in found.values())
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise FileFormatError(
            f"{path}: expected a JSON object whose weight_map is name -> file in this directory"
        ) from error
    return found


def find_checkpoint_weights(checkpoint: Checkpoint, roles: Roles | None = None) -> WeightMap:
    """The weights of a checkpoint, by names and shapes alone.

    A floating matrix is an `embedding` (row, dim) where its name says so (`embed`, `wte`, `wpe`),
    else `linear` (out, in); four axes are those of a `conv`. What three axes mean, and whether a
    matrix is stored the other way round, only `roles` can say.

    Args:
        checkpoint: its tensors.
        roles: regular expression -> roles; wins over names and shapes.
    """
    sites: list[WeightSite] = []
    dense: list[DenseParameter] = []
    vectors = 0
    for name, shard in checkpoint.where.items():
        file = checkpoint.files[shard]
        if name in file.same_as:
            continue  # an alias of another one
        dtype, shape = file.dtype_and_shape(name)
        kind, axes = _axes(name, shape, roles or {})
        if not dtype.is_floating_point:
            dense.append(DenseParameter(name, shape, Reason.NOT_FLOATING))
        elif axes is not None:
            owner = name.rpartition(".")[0]
            aliases = tuple(alias for alias, other in file.same_as.items() if other == name)
            text = str(dtype)[6:]
            sites.append(WeightSite(name, aliases, owner, "", kind, axes, shape, text, ()))
        elif len(shape) < 2:
            vectors += 1
        else:
            detail = f"{len(shape)} axes, whose roles the name does not tell"
            dense.append(DenseParameter(name, shape, Reason.FRONTEND, detail))
    return WeightMap(tuple(sites), tuple(dense), vectors, "names and shapes")


def _axes(name: str, shape: Sequence[int], roles: Roles) -> tuple[str, tuple[Role, ...] | None]:
    for regex, given in roles.items():
        if re.match(regex, name):
            if len(given) != len(shape):
                raise CheckpointError(
                    f"{name}: expected {len(shape)} roles, found {', '.join(given)} for {regex!r}"
                )
            return ("embedding" if "row" in given else "linear"), tuple(given)
    if len(shape) == 2:
        if _EMBEDDING.fullmatch(name):
            return "embedding", ("row", "dim")
        return "linear", ("out", "in")
    if len(shape) == 4:
        return "conv", ("out", "in", "kernel", "kernel")
    return "", None
