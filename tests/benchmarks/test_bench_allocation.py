"""The bars are named without a run, and are missed where they are."""

import pytest
import torch

from tests.benchmarks import bench_allocation
from tests.benchmarks.bench_allocation import Result


def test_the_bars_are_named_without_a_run(capsys):
    assert bench_allocation.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(bench_allocation.BARS.values())


def results(**shifts):
    names = [*bench_allocation.RULES, "OWL, plainly", "blocks", "blocks, plainly"]
    losses = torch.linspace(1, 2, 50)
    noise = 0.001 * torch.cos(torch.arange(50.0) * torch.pi)
    yield Result("dense", 0.0, losses, [], 0.0)
    for level in bench_allocation.LEVELS:
        for name in names:
            moved = losses + shifts.get(name.replace(", ", "_"), 0.0)
            yield Result(name, level, moved + noise * (name == "blocks"), [level], 0.0)


@pytest.mark.parametrize(
    ("shifts", "code"),
    [
        ({}, 0),
        ({"OWL": 0.004}, 0),
        ({"OWL": 0.006}, 1),
        ({"LeastError": 1e-4}, 1),
        ({"LeastError": -1e-4}, 0),
        ({"blocks": 1e-4}, 0),
        ({"blocks": 1e-3}, 1),
    ],
)
def test_check_says_whether_the_bars_are_met(capsys, monkeypatch, shifts, code):
    monkeypatch.setattr(bench_allocation, "measure", lambda *_: results(**shifts))
    assert bench_allocation.main([]) == 0
    assert bench_allocation.main(["--check"]) == code
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) == bool(code)
    assert "60%: OWL is at most 0.5% above" in printed
