"""The bars are named without a run, and are missed where they are."""

import pytest

from tests.benchmarks import bench_search
from tests.benchmarks.bench_search import Result


def test_the_bars_are_named_without_a_run(capsys):
    assert bench_search.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(bench_search.BARS.values())


@pytest.mark.parametrize(
    ("cosine", "perplexity", "code"),
    [(0.9, 6.0, 0), (0.95, 5.5, 0), (0.89, 6.0, 1), (0.9, 6.1, 1)],
)
def test_check_says_whether_the_bars_are_met(capsys, monkeypatch, cosine, perplexity, code):
    figures = (0.6, 0.9, 4, 10.0, 20.0)
    results = {
        "all-MiniLM-L6-v2": Result(
            "all-MiniLM-L6-v2", 0.5, True, 1.0, cosine, figures[0], figures[1], *figures[2:]
        ),
        "language model": Result(
            "language model", 0.5, False, 5.0, perplexity, figures[0], 6.0, *figures[2:]
        ),
    }
    monkeypatch.setattr(bench_search, "minilm", lambda: "all-MiniLM-L6-v2")
    monkeypatch.setattr(bench_search, "language_model", lambda *_: "language model")
    monkeypatch.setattr(bench_search, "measure", lambda name: iter([results[name]]))
    assert bench_search.main([]) == 0
    assert bench_search.main(["--check"]) == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)
