"""One library of C++ operators: found or built, loaded once, and a sentence on how that went."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fx_sparsity._native import cache, compiler, instruction_sets
from fx_sparsity._native.compiler import BuildError
from fx_sparsity._native.instruction_sets import InstructionSet

logger = logging.getLogger("fx_sparsity")

COMPILED = Path(__file__).with_name("compiled")
"""Where a wheel brings libraries along, see `wheel.py`; other installations have no such folder.

It is not asked who can write there: who can, can change the code beside it.
"""


class Library:
    """C++ operators that register themselves in `torch.ops` when loaded.

    Nothing happens before the first `ready`. Then the library is loaded: the one that the wheel
    brought, or the one in the cache, which is compiled if it is not there. Where nothing works, one
    line is logged and the caller goes on without.

    Args:
        name: for file names and messages.
        sources: C++ files, compiled together; headers in the same folders, and those that
            all libraries share, belong to them.
        flags: what the compiler gets beside the usual flags, asked for when the library is looked
            for.
        wheel_flags: the same where a wheel is made.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path],
        flags: Callable[[], list[str]] = list,
        wheel_flags: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.sources = list(sources)
        self._flags = flags
        self._wheel_flags = list(wheel_flags)
        self._lock = threading.Lock()
        self._outcome: tuple[bool, str] | None = None

    def ready(self) -> bool:
        """Whether the operators can be called; loads, and if need be builds, on the first call.

        `FX_SPARSITY_KERNELS=0` in the environment turns them off: here at any time, but operators
        that torch has a kernel of once they are loaded do not ask here again.
        """
        return self.state()[0]

    def state(self) -> tuple[bool, str]:
        """Whether the operators can be called, and why (not), in one line."""
        if os.environ.get("FX_SPARSITY_KERNELS") == "0":
            return False, "plain torch, because FX_SPARSITY_KERNELS=0"
        if self._outcome is None:
            with self._lock:
                if self._outcome is None:
                    self._outcome = self._load()
        return self._outcome

    def build(self) -> Path:
        """The compiled library: the wheel's, or the cache's, built if it is not there yet.

        Raises:
            BuildError: it cannot be built; that is not logged.
        """
        if brought := self._brought():
            return brought
        name = self._file_name()
        for folder in cache.folders():
            if cache.usable(folder) and cache.usable(folder / name):
                return folder / name
        command = compiler.find()
        refused = []
        for folder in cache.folders():
            if refusal := cache.refusal(folder):
                refused.append(refusal)
                continue
            because = f" ({', '.join(refused)})" if refused else ""
            # A warning, so that whoever waits can see why.
            logger.warning(
                "%s: compiling C++ kernels with %s into %s%s; once, some seconds",
                self.name,
                command[0],
                folder,
                because,
            )
            compiler.compile_library(command, self.sources, folder / name, self._options())
            return folder / name
        raise BuildError(", ".join(refused))

    def build_for_wheel(self, folder: Path, instructions: InstructionSet) -> Path:
        """Compile the library into a folder, for every machine that has the instructions.

        Raises:
            BuildError: it cannot be built.
        """
        target = folder / self._wheel_name(instructions)
        options = self._wheel_options(instructions)
        compiler.compile_library(compiler.find(), self.sources, target, options)
        return target

    def _brought(self) -> Path | None:
        """What the wheel brought for this processor, loaded; None if there is none that loads."""
        instructions = instruction_sets.best(instruction_sets.features())
        if instructions is None:
            return None
        path = COMPILED / self._wheel_name(instructions)
        if not path.exists():
            return None
        try:
            self._try(path)
        except OSError as error:
            logger.warning("%s: not what the wheel brought, because %s", self.name, _line(error))
            return None
        return path

    def _try(self, path: Path) -> None:
        """Raise OSError where what the wheel brought does not load here."""
        torch.ops.load_library(path)

    def _options(self) -> list[str]:
        return [*compiler.flags(), *self._flags()]

    def _file_name(self) -> str:
        return cache.file_name(self.name, self._files(), [*cache.machine(), *self._options()])

    def _wheel_options(self, instructions: InstructionSet) -> list[str]:
        return [*compiler.flags(instructions.flags), *self._wheel_flags]

    def _wheel_name(self, instructions: InstructionSet) -> str:
        name = f"{self.name}-{instructions.name}"
        return cache.file_name(name, self._files(), self._wheel_options(instructions))

    def _files(self) -> list[Path]:
        folders = {compiler.INCLUDE, *(source.parent for source in self.sources)}
        return [*self.sources, *(header for folder in folders for header in folder.glob("*.h"))]

    def _load(self) -> tuple[bool, str]:
        try:
            path = self.build()
            torch.ops.load_library(path)
        except (BuildError, OSError) as error:
            reason = f"plain torch, because {_line(error)}"
            logger.warning("%s: %s", self.name, reason)
            return False, reason
        reason = f"C++ kernels from {path}"
        logger.info("%s: %s", self.name, reason)
        return True, reason


class Schemas(Library):
    """A library of schemas alone, for processes without the Python code that defines them.

    It is built and handed out, and not loaded here, where they are defined already: torch ends the
    process of whoever defines them again.
    """

    def _try(self, path: Path) -> None:
        """Nothing can be tried."""


def _line(error: Exception) -> str:
    """What went wrong; torch says only which library it could not load, and why is its cause."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return str(cause).splitlines()[0]
