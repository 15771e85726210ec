"""Whether another process is at work on a file or a folder."""

import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def try_lock(descriptor: int) -> bool:
    """Lock what a descriptor was opened for, until it is closed or its process ends.

    Returns:
        False where it is locked already, through another descriptor.

    Raises:
        OSError: the system, or the file system, has no locks.
    """
    if fcntl is None:
        raise OSError("no locks")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at_work(path: str | os.PathLike[str]) -> bool:
    """Whether a process has locked a file; also where nobody can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        return not try_lock(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)
