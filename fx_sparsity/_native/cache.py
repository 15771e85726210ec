"""Where compiled libraries lie: a per-user folder, and names that say what a file fits."""

import hashlib
import os
import platform
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from fx_sparsity._native.instruction_sets import features


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


def usable(path: Path) -> bool:
    """Whether what lies in a folder, or a file, may be loaded: nobody else can have put it there.

    It is this user's or the system's, and so is every folder on the way; nobody else can write to
    it, nor exchange what is on the way. On systems without owners, whether it is there.
    """
    try:
        place = path.resolve(strict=True)
        if path == _temporary() and path.is_symlink():
            return False  # anybody can put one into the folder for all
        return not any(_is_open(part, part == place) for part in (place, *place.parents))
    except OSError:
        return False


def _is_open(path: Path, itself: bool) -> bool:
    """Whether other users can change a path.

    Args:
        path: a folder, or a file.
        itself: whether it is what is loaded from; of a folder above, a group that has but the user
            is no other, and what is in a sticky one is its owner's.
    """
    if not hasattr(os, "getuid"):
        return False
    info, me = path.stat(), os.getuid()
    mode = info.st_mode
    if not itself and (info.st_gid in (me, 0) or mode & stat.S_ISVTX):
        mode &= ~stat.S_IWGRP
    if not itself and mode & stat.S_ISVTX:
        mode &= ~stat.S_IWOTH
    return info.st_uid not in (me, 0) or bool(mode & (stat.S_IWGRP | stat.S_IWOTH))


def refusal(folder: Path) -> str:
    """Make `folder` if need be; why nothing to be loaded can be put there, empty where it can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return "" if usable(folder) else f"{folder} can be written by other users"
    except OSError:
        return f"{folder} cannot be written"


def file_name(name: str, sources: Iterable[Path], depends: Iterable[str]) -> str:
    """A name that changes with everything a compiled library depends on: its sources, and more.

    The compiler is left out: any of them builds to the same C interface, and an image without one
    has to find what was built ahead.
    """
    digest = hashlib.sha256()
    for part in [*(p.encode() for p in depends), *(s.read_bytes() for s in sorted(sources))]:
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{name}-{digest.hexdigest()[:16]}.so"


def machine() -> list[str]:
    """What a library in a cache depends on beside sources and flags.

    torch, C library and the instruction set, since machines may share a home.
    """
    return [torch.__version__, *platform.libc_ver(), instruction_set()]


def instruction_set() -> str:
    """What this machine's processor can execute, as the operating system lists it."""
    listed = sorted(features()) or [platform.processor()]
    return " ".join([platform.system(), platform.machine(), *listed])


def _temporary() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"fx_sparsity-{user}"
