"""`python -m tests.checkpoints.kills VERB FOLDER [N ...]`: killed on its way, and called again.

Makes a checkpoint in FOLDER, and a target without a kill. Then, for every N, one process is killed
at the N-th place (-1 is the last; all of them without N), and another one makes the same call,
unless all was done; what comes out must be the same, byte for byte. Places are before and after each call that changes what
is on the disk: syncs, renames, removals and new folders. Prints how many kills there were.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import fx_sparsity as fxs
from tests.checkpoints.test_prune_checkpoint import on_meta, save_shards
from tests.pruning.tiny_methods import TinyWanda


def sparsify(source, target):
    fxs.sparsify_checkpoint(source, target, {"global": "2:4"}, ranked="weight")


def prune(source, target):
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.ones(4, 8)
    fxs.prune_checkpoint(on_meta(model), TinyWanda(), [(batches,)], source=source, target=target)


def sparsify_file(source, target):
    file = next(source.glob("*.safetensors"))
    fxs.sparsify_checkpoint(file, target, {"global": "2:4"})


def forked(work, *arguments, kill_at=None, count=None):
    """Run in a fork; returns its exit code, negative for a signal."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = 0

    def place():
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(change):
        def call(*arguments, **options):
            place()
            change(*arguments, **options)
            place()

        return call

    for name in ("fsync", "replace", "rename", "unlink", "mkdir"):  # pathlib calls these, too
        setattr(os, name, counted(getattr(os, name)))
    try:
        work(*arguments)
        if count is not None:
            count.write_text(str(calls))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def contents(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def main():
    verb, root, *at = sys.argv[1:]
    torch.set_num_threads(1)  # so that forks do not wait for threads that they do not have
    work, root = globals()[verb], Path(root)
    torch.manual_seed(0)
    source = save_shards(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), root / "source"
    )
    save_file({"w": torch.ones(2)}, root / "other.safetensors")
    assert forked(work, source, root / "whole", count=root / "count") == 0
    expected = contents(root / "whole")
    calls = int((root / "count").read_text())
    kills = [int(n) % (calls + 1) for n in at] or range(1, calls + 1)
    for number in kills:
        target = root / f"target-{number}"
        assert forked(work, source, target, kill_at=number) == -signal.SIGKILL, number
        if not target.exists() or contents(target) != expected:  # else it was done
            assert forked(work, source, target) == 0, number
        assert contents(target) == expected, number
        assert sorted(p.name for p in root.glob(".*")) == []
        assert not list(root.glob("*.partial"))
        shutil.rmtree(target, ignore_errors=True)
    print(len(kills), "of", calls)


if __name__ == "__main__":
    main()
