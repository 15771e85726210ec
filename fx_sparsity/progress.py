"""How far long work has come: a bar on a terminal, and log lines elsewhere."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

Advance = Callable[[str, int], None]
"""Called with the name of what is done, and how much of the total that is."""


@contextmanager
def progress(what: str, total: int, show: bool, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Tell how far work has come, for as long as it takes.

    Args:
        what: is done, such as "pruning".
        total: of all that is to be done.
        show: False tells nothing. True draws a bar where standard error is a terminal and rich is
            installed, and else writes a log line (info) for each thing that is done.
        in_bytes: whether the total counts bytes.
    """
    if not show:
        yield lambda name, amount: None
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar(what, total, in_bytes) as advance:
            yield advance
    else:
        yield _logged(what, total)


@contextmanager
def _bar(what: str, total: int, in_bytes: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda name, amount: bar.update(task, advance=amount, description=f"{what} {name}")


def _logged(what: str, total: int) -> Advance:
    done = 0

    def advance(name: str, amount: int) -> None:
        nonlocal done
        done += amount
        _log.info("%s: %s (%d of %d)", what, name, done, total)

    return advance
