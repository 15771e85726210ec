"""Shared hooks: the list of skips is kept, so that `test_skips.py` can judge it at the end."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SKIPPED: list[tuple[str, bool]] = []


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; the only reason to skip")
    config.addinivalue_line("markers", "exhaustive: takes long; run with -m exhaustive")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "test_skips.py" in item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        SKIPPED.append((item.nodeid, item.get_closest_marker("gpu") is not None))
    return report
