"""`python -m tests.pruning.limited DIRECTORY LAYERS WIDTH MIB`: a checkpoint under a limit.

Makes a checkpoint of `LAYERS` square weights, prunes it with no more than `MIB` mebibytes of memory
of the process's own beyond what it takes at the start (RLIMIT_DATA, which the kernel enforces), and
shows that the model cannot be loaded under that limit. Prints figures as JSON.
"""

import ctypes
import json
import resource
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.storage import MappedFile, SafetensorsWriter, parameters_on_meta

MIB = 2**20
M_MMAP_THRESHOLD = -3  # malloc.h


class Stack(nn.Module):
    def __init__(self, layers, width):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def make_checkpoint(root, layers, width):
    """Two shards of random weights, written one by one."""
    root.mkdir(parents=True)
    names = [f"layers.{i}.weight" for i in range(layers)]
    places = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-{shard}.safetensors"
        with open(root / file, "wb") as opened:
            writer = SafetensorsWriter(opened, 200 * len(part))
            for name in part:
                writer.add(name, torch.randn(width, width) * width**-0.5)
            writer.finish({})
        places |= dict.fromkeys(part, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def status(key):
    """A size from the process's status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


class PeakOfOwnMemory:
    """The most anonymous resident memory above that at the start, in bytes, by sampling."""

    def __enter__(self):
        self.start, self.most, self.running = status("RssAnon"), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.most = max(self.most, status("RssAnon") - self.start)
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


def prune(root, layers, width):
    with parameters_on_meta():
        model = Stack(layers, width)
    batches = [(torch.randn(16, width),) for _ in range(2)]
    mapping = fxs.SparsityMapping().set_global("2:4")
    places = {"source": root / "source", "target": root / "target"}
    return fxs.prune_checkpoint(model, fxs.WandaSparsifier(), batches, mapping, **places)


def main():
    root, (layers, width, allowance) = Path(sys.argv[1]), map(int, sys.argv[2:])
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)  # what is freed is given back at once
    make_checkpoint(root / "small" / "source", 2, width)
    prune(root / "small", 2, width)  # whatever is loaded, built and kept once
    make_checkpoint(root / "source", layers, width)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + allowance * MIB,) * 2)
    with PeakOfOwnMemory() as peak:
        start = time.perf_counter()
        report = prune(root, layers, width)
        seconds = time.perf_counter() - start
    try:
        loaded = [load_file(path) for path in sorted((root / "source").glob("*.safetensors"))]
        Stack(layers, width).load_state_dict({n: t for part in loaded for n, t in part.items()})
        error = None
    except (RuntimeError, MemoryError, OSError) as refused:
        error = f"{type(refused).__name__}: {refused}"
    zeros = [
        float((layer == 0).float().mean())
        for layer in MappedFile(root / "target" / "model-0.safetensors").values()
    ]
    print(
        json.dumps(
            {
                "checkpoint": layers * width**2 * 4 / MIB,
                "limit": allowance,
                "peak": peak.most / MIB,
                "statistics": report.statistics_bytes / MIB,
                "activations": report.activation_bytes / MIB,
                "pruned": len(report),
                "zeros": [min(zeros), max(zeros)],
                "seconds": seconds,
                "loading": error,
            }
        )
    )


if __name__ == "__main__":
    main()
