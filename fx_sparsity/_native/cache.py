"""Where compiled libraries lie: a per-user folder, and names that say what a file fits."""

import hashlib
import os
import platform
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch


def folders() -> list[Path]:
    """Folders that may hold compiled libraries, in order of preference.

    `FX_SPARSITY_CACHE` if it is set, else `XDG_CACHE_HOME` or `~/.cache`; then one in the system's
    temporary folder, for homes that cannot be written.
    """
    found = []
    if chosen := os.environ.get("FX_SPARSITY_CACHE"):
        found.append(Path(chosen))
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        found.append(Path(base) / "fx_sparsity")
    return [*found, _temporary()]


def usable(folder: Path) -> bool:
    """Whether libraries from `folder` may be loaded.

    Anybody can make a folder in the shared temporary one, so that has to be this user's alone.
    """
    if folder != _temporary():
        return folder.is_dir()
    try:
        info = folder.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or info.st_uid == os.getuid()
    return stat.S_ISDIR(info.st_mode) and mine and not info.st_mode & 0o022


def writable(folder: Path) -> bool:
    """Make `folder` if need be; whether a file can be put there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return usable(folder)
    except OSError:
        return False


def file_name(name: str, sources: Iterable[Path], flags: Iterable[str]) -> str:
    """A name that changes with everything a compiled library depends on.

    Sources, flags, torch, C library and the instruction set, since machines may share a home. The
    compiler is left out: any of them builds to the same C interface, and an image without one has
    to find what was built ahead.
    """
    digest = hashlib.sha256()
    parts = [torch.__version__, *platform.libc_ver(), instruction_set(), *flags]
    for part in [*(p.encode() for p in parts), *(s.read_bytes() for s in sorted(sources))]:
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{name}-{digest.hexdigest()[:16]}.so"


def instruction_set() -> str:
    """What this machine's processor can execute, as the operating system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    features = sorted(flags.partition(":")[2].split()) or [platform.processor()]
    return " ".join([platform.system(), platform.machine(), *features])


def _temporary() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"fx_sparsity-{user}"
