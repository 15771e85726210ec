"""The benchmark runs; how fast depends on the machine, and is not for a test to say."""

import pytest

from tests.benchmarks import bench_oneshot


def test_it_runs(capsys):
    assert bench_oneshot.main(["--small", "--runs", "1"]) == 0
    out = capsys.readouterr().out
    assert all(f"{bar}: " in out for bar in bench_oneshot.BARS)


def test_bars_are_listed(capsys):
    assert bench_oneshot.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == bench_oneshot.BARS


@pytest.mark.parametrize(
    ("alps", "missed"), [((0.6, 3.9), []), ((0.7, 3.9), [4]), ((0.6, 4.1), [5])]
)
def test_what_misses_a_bar(alps, missed):
    error, seconds = alps
    speeds = [bench_oneshot.Speed(2048, "2:4", 3.0, 1.0, 2.0)]
    qualities = [
        bench_oneshot.Quality(
            size,
            "mixed",
            "2:4",
            {"composed": 0.75, "Wanda": 1.5, "ALPS": error},
            {"composed": 3.5, "ALPS": seconds},
        )
        for size in (1024, 2048)
    ]
    verdicts = list(bench_oneshot.verdicts(speeds, qualities))
    assert [i for i, (_, _, met) in enumerate(verdicts) if not met] == missed
