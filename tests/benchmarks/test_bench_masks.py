"""The benchmark runs; how fast depends on the machine, and is not for a test to say."""

import pytest

from tests.benchmarks import bench_masks


@pytest.mark.exhaustive
def test_it_runs(capsys):
    results = bench_masks.main(["--small", "--runs", "1", "--reference-runs", "1"])
    assert len(results) == 22
    assert {result.cell.pattern for result in results} == {
        "1x1",
        "1x4",
        "4x4",
        "16x16",
        "32x32",
        "2:4",
    }
    assert all(min(result.times) > 0 for result in results)
    assert "extra memory" in capsys.readouterr().out
