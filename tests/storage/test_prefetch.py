"""An iterator that works while its caller does."""

import contextlib
import threading

import pytest

from fx_sparsity.storage.prefetch import prefetch


def test_the_next_item_is_made_while_one_is_used():
    begun = [threading.Event() for _ in range(4)]

    def items():
        for number in range(3):
            begun[number].set()
            yield number

    for number in prefetch(items()):
        if number < 2:
            assert begun[number + 1].wait(5)
            assert not begun[number + 2].is_set()


def test_an_error_comes_after_the_items_before_it_and_the_thread_ends():
    def items():
        yield 1
        raise KeyError("two")

    threads = threading.active_count()
    with contextlib.closing(prefetch(items())) as ahead:
        assert next(ahead) == 1
        with pytest.raises(KeyError, match="two"):
            next(ahead)
    assert threading.active_count() == threads

    taken = prefetch(items())
    assert next(taken) == 1
    taken.close()
    assert threading.active_count() == threads
