"""A bar while weights are pruned, where there is a terminal, and log lines elsewhere."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)


@contextmanager
def progress(total: int, show: bool | None) -> Iterator[Callable[[str], None]]:
    """What to call with the name of each weight that is done.

    Args:
        total: number of weights.
        show: True draws a bar with rich, False draws none, None where rich is installed and
            standard error is a terminal. Without a bar there is a log line (info) a weight.

    Raises:
        ModuleNotFoundError: `show` is True without rich.
    """
    if show is None:
        show = importlib.util.find_spec("rich") is not None and sys.stderr.isatty()
    if not show:
        done = 0

        def log(fqn: str) -> None:
            nonlocal done
            done += 1
            _log.info("pruned %s (%d of %d)", fqn, done, total)

        yield log
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("pruning", total=total)

        def advance(fqn: str) -> None:
            bar.update(task, advance=1, description=fqn)

        yield advance
