"""Runs last: nothing is skipped but what needs a GPU."""

from tests.conftest import SKIPPED


def test_only_gpu_tests_are_skipped():
    assert [test for test, needs_gpu in SKIPPED if not needs_gpu] == []
