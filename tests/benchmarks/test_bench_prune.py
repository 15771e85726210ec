"""The benchmark runs, and what it says of memory holds; how fast depends on the machine."""

import pytest

from tests.benchmarks import bench_prune


@pytest.mark.exhaustive
def test_it_runs(capsys):
    costs, memories = bench_prune.main(["--batches", "1", "2", "--runs", "1", "--held", "4"])
    assert [cost.tokens for cost in costs] == [1024, 2048]
    assert all(memory.tensors <= memory.allowed for memory in memories)
    assert "at the usual 262144 tokens" in capsys.readouterr().out
