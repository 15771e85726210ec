"""What all runs have in common: where unfinished work lies, what is refused, and kills."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fx_sparsity.checkpoints import Checkpoint, CheckpointError, convert
from fx_sparsity.checkpoints.run import LOG, Run


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "source" / "x.safetensors")
    (tmp_path / "source" / "more").mkdir()
    (tmp_path / "source" / "more" / "x.json").write_text("{}")
    return Checkpoint(tmp_path / "source")


def test_a_folder_grows_beside_its_place(source, tmp_path):
    target = tmp_path / "target"
    run = Run(source, target, {"level": 0.5})
    assert not list(tmp_path.glob("target*"))
    run.begin({"shards": []})
    run.copy([*source.shards, *source.others])
    assert not target.exists()
    run.done["shards"].append("x")
    run.save()
    again = Run(source, target, {"level": 0.5})
    assert again.done == {"shards": ["x"]}
    with pytest.raises(
        CheckpointError, match=r"partial: was begun otherwise: level 0.5 there, now"
    ):
        Run(source, target, {"level": 0.6})
    again.begin({"shards": []})
    assert again.done == {"shards": ["x"]}
    again.finish()
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*")) == [
        *("more", "more/x.json", "x.safetensors")
    ]
    assert not run.folder.exists()
    with pytest.raises(CheckpointError, match="target: is there already; remove it, or choose"):
        Run(source, target, {"level": 0.5})


def test_another_source_is_another_run(source, tmp_path):
    Run(source, tmp_path / "target", {}).begin({})
    save_file({"a": torch.zeros(2)}, tmp_path / "source" / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"begun otherwise: source x.safetensors \[\d+, "):
        Run(Checkpoint(tmp_path / "source"), tmp_path / "target", {})


def test_a_kill_before_the_first_entry_leaves_nothing_to_be_refused(source, tmp_path):
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / f".{LOG}.0123456789ab.part").touch()
    Run(source, tmp_path / "target", {}).begin({})
    assert [p.name for p in (tmp_path / "target.partial").iterdir()] == [LOG]


def test_a_kill_after_the_renaming_leaves_nothing_to_be_refused(source, tmp_path):
    run = Run(source, tmp_path / "target", {})
    run.begin({"shards": ["x"]})
    run.folder.rename(tmp_path / "target")
    with pytest.raises(CheckpointError, match="target: is there already"):
        Run(source, tmp_path / "target", {"level": 0.5})
    again = Run(source, tmp_path / "target", {})
    again.begin({"shards": []})
    assert again.done == json.loads((tmp_path / "target.partial" / LOG).read_text())["done"]
    again.finish()
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "at"),
    [
        ("sparsify", (2, 9, 30, 40, 55, 70, 80, -4, -2, -1)),
        ("sparsify_file", ()),
        ("prune", (2, 40, -3)),
        pytest.param("sparsify", (), marks=pytest.mark.exhaustive),
        pytest.param("prune", (), marks=pytest.mark.exhaustive),
    ],
)
def test_killed_at_any_change_and_called_again(tmp_path, verb, at):
    command = [sys.executable, "-m", "tests.checkpoints.kills", verb, str(tmp_path)]
    found = subprocess.run(
        [*command, *map(str, at)], capture_output=True, text=True, check=False, timeout=300
    )
    assert found.returncode == 0, found.stderr
    kills, _, calls = found.stdout.split()
    assert int(kills) == (len(at) or int(calls))


WORKING = """
import sys
from fx_sparsity.checkpoints import Checkpoint
from fx_sparsity.checkpoints.run import Run
run = Run(Checkpoint(sys.argv[1]), __import__("pathlib").Path(sys.argv[2]), {})
run.begin({"shards": []})
print("begun", flush=True)
sys.stdin.read()
run.finish()
"""


def test_of_two_processes_at_one_target_the_second_is_refused(source, tmp_path):
    target = tmp_path / "target"
    before = Run(source, target, {})
    command = [sys.executable, "-c", WORKING, str(source.folder), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        log = (tmp_path / "target.partial" / LOG).read_bytes()
        for run in (before, Run(source, target, {})):
            with pytest.raises(CheckpointError, match="partial: another process "):
                run.begin({"shards": ["x"]})
        assert (tmp_path / "target.partial" / LOG).read_bytes() == log
        other.kill()
    run = Run(source, target, {})  # a killed process holds nothing
    run.begin({})
    run.close()
    with pytest.raises(CheckpointError, match="another process went on with it; call again"):
        before.begin({})
    run.begin({})
    run.copy(source.shards)
    run.finish()
    with pytest.raises(CheckpointError, match="target: is there already"):
        before.begin({})
    assert not run.folder.exists()


def test_a_run_that_fails_lets_others_go_on(source, tmp_path, monkeypatch):
    def fail(self, *names):
        raise OSError("disk full")

    monkeypatch.setattr(Run, "copy", fail)
    with pytest.raises(OSError, match="disk full") as caught:
        convert(source.folder, tmp_path / "target")
    again = "import sys; from fx_sparsity.checkpoints import convert; convert(*sys.argv[1:])"
    command = [sys.executable, "-c", again, str(source.folder), str(tmp_path / "target")]
    subprocess.run(command, check=True)
    assert caught.value is not None  # it, and its frames, are alive
    assert (tmp_path / "target" / "x.safetensors").exists()
