"""The benchmark of sparse training: its arithmetic and its bars; no row is measured."""

import sys

import pytest

from tests.benchmarks import bench_training, training_recovery, training_small, training_step
from tests.benchmarks.bench_accuracy import Options
from tests.benchmarks.corpora import domains


def test_a_gap_is_extrapolated_by_its_own_fall():
    assert training_recovery.extrapolated(0.8, 0.4) == pytest.approx(0.2)
    assert training_recovery.extrapolated(0.4, 0.5) == 0.5  # it did not fall
    assert training_recovery.extrapolated(-0.1, 0.1) == 0.1


@pytest.mark.parametrize(("after", "missed"), [(2.2, 0), (2.9, 4)])
def test_a_recovery_has_bars(after, missed):
    def losses(value):
        return {d.name: [value, value + 1] for d in domains()}

    run = {"losses": losses(after), "seconds": 1.0, "trained": 5, "memory": {"model": 1e6}}
    early = {"losses": losses(2.6)}
    lines, failed = training_recovery.told(
        "row", domains(), losses(2.0), {"losses": losses(3.0)}, run, early, "kept"
    )
    assert len(failed) == missed
    assert f"{after - 2:.2f}" in lines[2]
    assert (
        training_recovery.told(
            "row", domains(), losses(2.0), {"losses": losses(3.0)}, run, None, "vectors"
        )[1]
        == []
    )


def test_algorithms_are_compared_by_paired_seeds():
    found = {kind: [1.0, 2.0, 3.0] for kind in training_small.KINDS}
    found |= {"dense": [0.5, 1.5, 2.5], "one-shot": [1.1, 2.1, 3.1], "SET": [1.2, 2.2, 3.2]}
    assert training_small.missed("row", found) == ["row, SET: no better than one-shot"]
    lines = training_small.table(found)
    assert next(line for line in lines if line.startswith("RigL")).endswith("0.1000 +- 0.0000")
    assert training_small.orders(found).startswith("RigL before SET: yes; SET before static: no")


@pytest.mark.parametrize(("masked", "update", "missed"), [(1.1, 5.0, 0), (1.2, 6.1, 2)])
def test_masks_may_cost_so_much(masked, update, missed):
    times = {"gradual": {"dense": 1.0, "masked": masked, "update": update}}
    assert len(training_step.told("row", times)[1]) == missed


@pytest.mark.parametrize(("cosine", "code"), [(0.94, 0), (0.92, 1)])
def test_a_missed_bar_is_an_error(tmp_path, monkeypatch, capsys, cosine, code):
    times = {
        size: {"dense": 30.0, "dense int8": 16.0, "lowered": 9.0, "lowered int8": 10.0}
        for size in ("1", "8")
    }
    found = {"cosine": cosine, "int8": 0.9, "seconds": 1.0, "times": times}
    monkeypatch.setattr(Options, "once", lambda *_: found)
    monkeypatch.setattr(sys, "argv", ["", "--check", "--row", "minilm-80%"])
    assert bench_training.main() == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)
