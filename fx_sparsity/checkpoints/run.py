"""Work on a folder that may be killed at any moment, and goes on when it is asked for again."""

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.storage.container import FileFormatError, replacing, sync_folder
from fx_sparsity.storage.json_files import read_json
from fx_sparsity.storage.locks import try_lock

_log = logging.getLogger(__name__)
LOG = ".run.json"
"""Name of the log in the folder of unfinished work."""
_BUFFER = 1 << 20


class Run:
    """From a checkpoint to a folder that grows as `<target>.partial`, and is renamed when complete.

    A log in that folder holds what was asked, and what is done so far. It is the first that is
    written there and, after the renaming, the last that is removed: no half-done folder has the
    target's name, and whenever a kill comes, the same call goes on.

    Args:
        source: what is read.
        target: the folder to be; not there, or empty.
        asked: everything that decides on the outcome, for JSON.

    Attributes:
        folder: where the work is done.
        done: what is done so far, for JSON; empty before `begin`, unless a former run left it.

    Raises:
        CheckpointError: the target is there or lies in the source, or its partial folder was begun
            otherwise. Nothing is changed before `begin`, which keeps other processes out until
            `close`.
    """

    def __init__(self, source: Checkpoint, target: Path, asked: Mapping[str, Any]) -> None:
        self._source, self._target = source, target
        self.folder = target.with_name(f"{target.name}.partial")
        if source.is_folder and target.resolve().is_relative_to(source.folder.resolve()):
            raise CheckpointError(f"{target}: is the source, or lies in it; choose another target")
        stats = {shard: (source.folder / shard).stat() for shard in source.shards}
        files = {shard: [stat.st_size, stat.st_mtime_ns] for shard, stat in stats.items()}
        self._asked = json.loads(json.dumps({**asked, "source": files}))
        self.done: dict[str, Any] = {}
        self._complete = False
        self._lock: _Lock | None = None
        self._look()

    def begin(self, nothing: Mapping[str, Any]) -> None:
        """Make the folder, or take up what is there; call it when nothing can be refused any more.

        Args:
            nothing: what is done at first.

        Raises:
            CheckpointError: another process is at it.
        """
        self._look_again()
        place = self._target if self._complete else self.folder
        place.mkdir(parents=True, exist_ok=True)
        self._lock = _Lock(place)
        self._look_again()  # now that no other process can change it
        if self._complete:  # but for the removal of the log
            os.replace(self._target, self.folder)
        for unfinished in self.folder.rglob(".*.part"):
            unfinished.unlink()
        if self.done:
            _log.info("%s: going on", self.folder)
        self.done = self.done or dict(nothing)
        self.save()

    def save(self) -> None:
        """Write down what is done, whole or not at all."""
        content = {"asked": self._asked, "done": self.done}
        with replacing(self.folder / LOG) as file:
            file.write(json.dumps({**content, "crc32": _checksum(content)}).encode())

    def copy(self, names: Sequence[str]) -> None:
        """Copy files of the source that are not there yet; each appears whole."""
        for name in names:
            path = self.folder / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._source.folder / name, "rb") as original, replacing(path) as file:
                    shutil.copyfileobj(original, file, _BUFFER)

    def finish(self) -> None:
        """Give the folder its name."""
        check_free(self._target)
        os.replace(self.folder, self._target)
        sync_folder(self._target.parent)
        (self._target / LOG).unlink()

    def close(self) -> None:
        """Let other processes go on, if this one does not."""
        if self._lock is not None:
            self._lock.release()

    def begun_otherwise(self, difference: str) -> CheckpointError:
        """What to raise where a former run was asked for something else.

        Args:
            difference: what was asked there, and what now.
        """
        return CheckpointError(
            f"{self.folder}: was begun otherwise: {difference}; repeat the call that began it, "
            "or remove that folder"
        )

    def _look(self) -> None:
        """Find out what is done, and what is in the way."""
        self.done = {}
        self._complete = self._is_complete()
        if not self._complete:
            check_free(self._target)
            self._check_folder()

    def _look_again(self) -> None:
        """Raise where the work is not as far as it was found to be at first."""
        known = self.done
        self._look()
        if self.done != known:
            self.done = known
            raise CheckpointError(f"{self.folder}: another process went on with it; call again")

    def _is_complete(self) -> bool:
        """Whether this very run was killed after the renaming."""
        if not (self._target / LOG).exists():
            return False
        found = _read_log(self._target / LOG)
        if found is None or found["asked"] != self._asked:
            return False
        self.done = found["done"]
        return True

    def _check_folder(self) -> None:
        log = self.folder / LOG
        if log.exists():
            found = _read_log(log)
            if found is None:
                raise CheckpointError(f"{log}: is not as a run wrote it; remove {self.folder}")
            if difference := _difference(found["asked"], self._asked):
                raise self.begun_otherwise(difference)
            self.done = found["done"]
        elif self.folder.exists():
            # A kill before the first entry leaves nothing but a part of that.
            strange = [path.name for path in self.folder.iterdir() if not path.match(f".{LOG}.*")]
            if strange:
                raise CheckpointError(
                    f"{self.folder}: holds {strange[0]}, but no run began it; remove that folder"
                )


def _read_log(path: Path) -> dict[str, Any] | None:
    """What `Run.save` wrote; None where something else is there."""
    try:
        found = read_json(path)
        said = found.pop("crc32", None)
        return found if said == _checksum(found) else None
    except FileFormatError:
        return None


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())


class _Lock:
    """Keeps a folder from other processes, also when it is renamed; not from this one.

    Raises:
        CheckpointError: another process has it.
    """

    _mine: ClassVar[dict[tuple[int, int], int]] = {}  # device and inode -> descriptor

    def __init__(self, folder: Path) -> None:
        found = folder.stat()
        self._key = found.st_dev, found.st_ino
        if self._key in self._mine or not hasattr(os, "O_DIRECTORY"):
            return
        descriptor, locked = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), True
        with contextlib.suppress(OSError):  # of file systems without locks
            locked = try_lock(descriptor)
        if not locked:
            os.close(descriptor)
            raise CheckpointError(f"{folder}: another process is at work there; wait for it")
        self._mine[self._key] = descriptor

    def release(self) -> None:
        """Give it to whoever comes."""
        descriptor = self._mine.pop(self._key, None)
        if descriptor is not None:
            os.close(descriptor)


def check_free(target: Path, *, is_folder: bool = True) -> None:
    """Raise `CheckpointError` where something is in the place of a folder or a file to be.

    An empty folder is in no folder's way.
    """
    empty = is_folder and target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty:
        raise CheckpointError(f"{target}: is there already; remove it, or choose another target")


def _difference(there: Any, now: Any, name: str = "") -> str:
    """The first difference of two values from JSON, in words; empty where they are equal."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in {**now, **there}:
            if found := _difference(there.get(key), now.get(key), f"{name} {key}".strip()):
                return found
        return ""
    return "" if there == now else f"{name} {there!r} there, now {now!r}"
