"""An iterator that works while its caller does."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items; a thread works on the next one while the caller has one.

    It begins with that only when the caller is done with the one before, so that two are alive.
    Close it (`contextlib.closing`), so that the thread ends.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
            del item  # while the next one is waited for
