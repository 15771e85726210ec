"""Every Python block of the README runs, in order, in one namespace; outputs shown are the real ones."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", text, re.M | re.S)
    assert len(blocks) >= 7
    namespace = {"__name__": "readme"}
    for code, shown in blocks:
        exec(compile(code, "README.md", "exec"), namespace)
        printed = capsys.readouterr().out
        if shown:
            assert printed == shown


def test_ci_runs_the_test_command_of_the_readme():
    command = 'pip install -e ".[test]" && pytest -n 2'
    assert command in README.read_text()
    assert command in (README.parent / ".ci" / "run").read_text()
