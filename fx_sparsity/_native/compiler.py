"""Calling the C++ compiler: straight, without a build system, over torch's stable ABI headers."""

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fx_sparsity.errors import FxSparsityError

_TIMEOUT = 600  # seconds

_STANDARD = ["-lstdc++"] if platform.system() == "Linux" else []

INCLUDE = Path(__file__).parent / "csrc" / "shared"
"""Headers that several libraries share."""


class BuildError(FxSparsityError, RuntimeError):
    """A library cannot be built; one line says why."""


def flags(instructions: Sequence[str] = ("-march=native",)) -> list[str]:
    """Compiler flags, those that choose instructions among them: this machine's, unless told."""
    found = ["-std=c++20", "-O3", *instructions, "-fPIC", "-shared"]
    if platform.machine() in ("x86_64", "AMD64"):
        found.append("-mprefer-vector-width=512")
    if platform.system() == "Darwin":
        found += ["-undefined", "dynamic_lookup"]
    # The oldest torch whose stable ABI is used, whichever torch the headers come from.
    return [*found, "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def find() -> list[str]:
    """The compiler's command line: `$CXX`, or the first of the usual names on the path.

    Raises:
        BuildError: there is none.
    """
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]):
            return command
        raise BuildError(f"the C++ compiler in $CXX, {command[0]!r}, was not found")
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler was found (tried $CXX, c++, g++, clang++)")


def compile_library(
    command: Sequence[str], sources: Sequence[Path], target: Path, options: Sequence[str]
) -> None:
    """Compile `sources` into the shared library `target`, which appears whole or not at all.

    Args:
        command: the compiler, see `find`.
        sources: files to compile, several at once; headers beside them and in `INCLUDE` are found.
        target: where the library goes; its folder exists.
        options: what the compiler gets beside files and folders, see `flags`.

    Raises:
        BuildError: the compiler fails, hangs or cannot be started, or the folder cannot be written.
    """
    root = Path(torch.__file__).parent
    # The stable ABI is in one of torch's libraries. Others of them export parts of a libstdc++ as
    # well, which may be gone in the next torch: the system's comes first.
    libraries = [*_STANDARD, f"-L{root / 'lib'}", "-ltorch_cpu"]
    try:
        with (
            _locked(target.with_suffix(".lock")),
            tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder,
        ):
            if target.exists():  # another process was faster
                return
            unfinished = Path(folder) / target.name
            start = [*command, *options, "-isystem", str(root / "include")]
            start += ["-I", str(INCLUDE)]
            if len(sources) > 1:
                sources = _objects([part for part in start if part != "-shared"], sources, folder)
            _run([*start, *map(str, sources), "-o", str(unfinished), *libraries])
            os.replace(unfinished, target)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish within {_TIMEOUT} s") from error
    except OSError as error:
        raise BuildError(f"{command[0]} could not build {target}: {error}") from error


def _objects(start: Sequence[str], sources: Sequence[Path], folder: str) -> list[Path]:
    """Compile sources into object files, as many at once as there are processors."""
    objects = [Path(folder) / f"{number}.o" for number in range(len(sources))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = [
            [*start, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, lines))
    return objects


def _run(line: Sequence[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode:
        output = [text for text in done.stderr.splitlines() if text.strip()]
        reason = next((t for t in output if "error" in t), (output or ["no message"])[0])
        raise BuildError(f"{line[0]} failed with exit status {done.returncode}: {reason.strip()}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process build at a time, where files can be locked; elsewhere all of them build."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
