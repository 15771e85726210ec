"""The bars are named without a run, and are missed where they are."""

import pytest

from tests.benchmarks import bench_alps
from tests.benchmarks.bench_alps import Result


def test_the_bars_are_named_without_a_run(capsys):
    assert bench_alps.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(bench_alps.BARS)


@pytest.mark.parametrize(
    ("quick", "time", "missed"),
    [(0.65, 3.9, 0), (0.67, 3.9, 1), (0.65, 4.1, 1), (0.71, 4.1, 3)],
)
def test_check_says_which_bars_are_missed(capsys, monkeypatch, quick, time, missed):
    def measure(size, inputs, pattern, runs, published):
        return Result(size, inputs, pattern, quick, 0.7, 0.6 if published else None, time, 1.0)

    monkeypatch.setattr(bench_alps, "measure", measure)
    assert bench_alps.main([]) == 0
    assert bench_alps.main(["--check"]) == int(missed > 0)
    assert capsys.readouterr().out.count("MISSED") == 2 * missed


def test_a_small_layer_is_measured():
    result = bench_alps.measure(64, "mixed", "2:4", runs=1, published=True)
    assert result.alps is not None
    assert result.quick == pytest.approx(result.alps)
