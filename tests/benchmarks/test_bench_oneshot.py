"""The benchmark runs; how fast depends on the machine, and is not for a test to say."""

from tests.benchmarks import bench_oneshot


def test_it_runs(capsys):
    speeds, qualities = bench_oneshot.main(["--small", "--runs", "1"])
    assert [speed.pattern for speed in speeds] == bench_oneshot.PATTERNS
    assert len(qualities) == 4
    assert all(set(q.errors) == set(q.times) == set(bench_oneshot.METHODS) for q in qualities)
    assert all(q.errors["composed"] < 0.8 < 1 < q.errors["Wanda"] for q in qualities)
    assert "the published mark" in capsys.readouterr().out
