"""Progress: a bar on a terminal, log lines elsewhere, or nothing."""

import logging
import sys

import pytest

from fx_sparsity import progress


@pytest.mark.parametrize(("rich", "terminal"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("in_bytes", [True, False])
def test_a_bar_on_a_terminal_and_log_lines_elsewhere(
    caplog, capsys, monkeypatch, rich, terminal, in_bytes
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    if not rich:
        monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    with (
        caplog.at_level(logging.INFO),
        progress.progress("pruning", 3, True, in_bytes=in_bytes) as advance,
    ):
        advance("a.weight", 1)
        advance("b.weight", 2)
    out, err = capsys.readouterr()
    assert out == ""
    if rich and terminal:
        assert "b.weight" in err
        assert caplog.text == ""
    else:
        assert err == ""
        assert caplog.messages == ["pruning: a.weight (1 of 3)", "pruning: b.weight (3 of 3)"]


def test_nothing_is_shown_when_nothing_is_asked_for(caplog, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO), progress.progress("pruning", 1, False) as advance:
        advance("a.weight", 1)
    assert (caplog.text, capsys.readouterr()) == ("", ("", ""))
