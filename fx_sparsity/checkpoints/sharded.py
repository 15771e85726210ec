"""Checkpoints as model hubs publish them: directories of safetensors files, and an index."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fx_sparsity.storage.container import FileFormatError
from fx_sparsity.storage.mapped import MappedFile

INDEX = ".safetensors.index.json"
"""How the name of an index ends: JSON, whose `weight_map` is name -> file."""
OTHER_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"})
"""Suffixes of files with weights in other formats, and of shards that an index does not name."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint.

    Attributes:
        root: the directory that holds them.
        weights: names of the files of tensors.
        others: names of what lies beside them: index, configuration, tokenizer.
        ignored: names of directories, and of files with weights that are none of this checkpoint.
    """

    root: Path
    weights: tuple[str, ...]
    others: tuple[str, ...]
    ignored: tuple[str, ...]

    @classmethod
    def find(cls, source: str | Path) -> "CheckpointFiles":
        """The files of a checkpoint.

        Args:
            source: one safetensors file, or a directory of them: those that its index names, else
                all of them.

        Raises:
            FileNotFoundError: no such path, no safetensors file in it, or none that an index names.
            FileFormatError: a directory with several indices, or a malformed one.
        """
        source = Path(source)
        if source.is_file():
            return cls(source.parent, (source.name,), (), ())
        names = sorted(entry.name for entry in source.iterdir())
        indices = [name for name in names if name.endswith(INDEX)]
        if len(indices) > 1:
            raise FileFormatError(f"{source}: expected one index, found {', '.join(indices)}")
        weights = [name for name in names if name.endswith(".safetensors")]
        if indices:
            weights = sorted(set(_read_index(source / indices[0]).values()))
            if absent := sorted({*weights} - {*names}):
                raise FileNotFoundError(f"{source / absent[0]}, which {indices[0]} names")
        if not weights:
            raise FileNotFoundError(f"{source}: expected safetensors files, found none")
        rest = [name for name in names if name not in weights]
        others = [
            name
            for name in rest
            if (source / name).is_file() and Path(name).suffix not in OTHER_WEIGHTS
        ]
        ignored = [name for name in rest if name not in others]
        return cls(source, tuple(weights), tuple(others), tuple(ignored))

    def copy_to(self, target: Path) -> None:
        """Copy every file that `target` does not hold yet; each appears there whole."""
        target.mkdir(parents=True, exist_ok=True)
        for name in (*self.weights, *self.others):
            if not (target / name).exists():
                temporary = target / f".{name}.copying"
                shutil.copyfile(self.root / name, temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, target / name)


class MappedCheckpoint(Mapping[str, Tensor]):
    """Name -> tensor of a checkpoint, over memory maps of its files; see `MappedFile`.

    Args:
        files: of the checkpoint.
        root: where they lie; by default where they were found.
        writable: writing into a tensor writes its file.

    Raises:
        FileFormatError: two files hold a tensor of one name, or a file is malformed.
    """

    def __init__(
        self, files: CheckpointFiles, root: Path | None = None, *, writable: bool = False
    ) -> None:
        where = files.root if root is None else root
        self._files: dict[str, MappedFile] = {}
        for name in files.weights:
            file = MappedFile(where / name, writable=writable)
            for tensor in file:
                if tensor in self._files:
                    raise FileFormatError(
                        f"{tensor} is in {name} and in {self._files[tensor].path.name} of {where}; "
                        "give the file that counts, or a directory with an index"
                    )
                self._files[tensor] = file

    def flush(self, *names: str) -> None:
        """Have what was written into these tensors on the disk."""
        for name in names:
            self._files[name].flush(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read_index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())["weight_map"]
        assert all(isinstance(name, str) and Path(name).name == name for name in found.values())
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise FileFormatError(
            f"{path}: expected a JSON object whose weight_map is name -> file in this directory"
        ) from error
    return found
