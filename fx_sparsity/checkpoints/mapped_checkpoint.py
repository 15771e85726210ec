"""Checkpoints in memory maps: tensors whose memory is the files, read where they are used."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.storage.mapped import MappedFile


class MappedCheckpoint(Mapping[str, Tensor]):
    """Name -> tensor of a checkpoint, over memory maps of its files; see `MappedFile`.

    Args:
        checkpoint: names the files.
        folder: where they lie; by default where they were found.
        writable: writing into a tensor writes its file.

    Raises:
        CheckpointError: two files hold a tensor of one name.
        FileFormatError: a file is malformed.
    """

    def __init__(
        self, checkpoint: Checkpoint, folder: Path | None = None, *, writable: bool = False
    ) -> None:
        where = checkpoint.folder if folder is None else folder
        self._files: dict[str, MappedFile] = {}
        for shard in checkpoint.shards:
            file = MappedFile(where / shard, writable=writable)
            for name in file:
                if name in self._files:
                    raise CheckpointError(
                        f"{name}: in {self._files[name].path.name} and in {shard} of {where}; "
                        "give the file that counts, or a folder with an index"
                    )
                self._files[name] = file

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
