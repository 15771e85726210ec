"""Shared hooks: a skip is a failure unless it is for want of a GPU."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several test processes share the processors: threads that wait for work must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# So that kernels are compiled for every instruction set, and tests can choose one.
os.environ.setdefault("FX_SPARSITY_CPU", "")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; the only reason to skip")
    config.addinivalue_line("markers", "exhaustive: takes long; run with -m exhaustive")


def pytest_collection_modifyitems(items):
    # The longest first, so that no process is left alone with them at the end.
    items.sort(key=lambda item: "test_examples.py" not in item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    expected = hasattr(report, "wasxfail") or item.get_closest_marker("gpu") is not None
    if report.skipped and not expected:
        report.outcome = "failed"
        report.longrepr = f"skipped without the marker gpu: {report.longrepr}"
    return report
