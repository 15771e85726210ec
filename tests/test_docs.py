"""Every Python and shell block of the pages runs, in order, a namespace a page; outputs shown are the real ones.

Blocks of `python` and `bash` are run in an empty folder; a block of `text` right after one is what it prints.
Commands that install something are blocks of `console`, which are not run.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.M | re.S)


def run_shell(code):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'PATH="{Path(sys.executable).parent}:$PATH"\n{code}'],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for language, code, shown in BLOCK.findall(page.read_text()):
        if language == "bash":
            printed = run_shell(code)
        else:
            exec(compile(code, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        if shown:
            assert printed == shown


def test_the_readme_has_blocks():
    assert len(BLOCK.findall(PAGES[0].read_text())) >= 3


def test_ci_runs_the_test_command_of_the_readme():
    command = 'pip install -e ".[test]" && pytest -n 2'
    assert command in PAGES[0].read_text()
    assert command in (ROOT / ".ci" / "run").read_text()
