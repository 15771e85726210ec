"""`python -m tests.benchmarks.bench_prune`: what one-shot pruning costs, next to forward passes.

A Llama of eight layers. Time: the whole call, its capture and its solutions apart, in forward passes
over the calibration set. Memory: what the walk allocates at its peak beyond the model, next to what
it is to be: the live activations, and statistics of a weight.
"""

import argparse
import os
import resource
import sys
import threading
import time
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fx_sparsity import prune
from fx_sparsity.calibration.batches import capture, read_batches
from tests.calibration.methods import Magnitude, Recorded, TinyWanda

SMALL = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408}


def make(layers, batches, rows, tokens):
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, SMALL["vocab_size"], (batches, rows, tokens))
    return model, [{"input_ids": batch} for batch in ids]


def seconds(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


class Peak:
    """The most resident memory of this process above that at the start, in MiB, by sampling."""

    def __enter__(self):
        self.start, self.most, self.running = resident(), 0.0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.most = max(self.most, resident() - self.start)
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def forward(model, batches):
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def report(kind, model, batches, passes):
    capturing, _ = seconds(lambda: capture(model, read_batches(model, batches)))
    with Peak() as peak:
        whole, (_, report) = seconds(lambda: prune(model, kind(), batches, progress=False))
    solving = sum(weight.seconds for weight in report.weights)
    walk = whole - capturing - solving
    print(
        f"{kind.__name__:12}  whole {whole / passes:5.2f}  capture {capturing / passes:5.2f}  "
        f"walk {walk / passes:5.2f}  solve {solving / passes:5.2f} forward passes; "
        f"statistics {report.statistics_bytes / 2**20:.1f} MiB, "
        f"resident {peak.most:.0f} MiB more"
    )


def main():
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    given = vars(parser.parse_args())
    model, batches = make(**given)
    forward(model, batches[:2])
    passes = min(seconds(lambda: forward(model, batches))[0] for _ in range(2))
    held = sum(p.nbytes for p in model.parameters()) / 2**20
    hidden = given["batches"] * given["rows"] * given["tokens"] * SMALL["hidden_size"] * 4 / 2**20
    print(f"{given}: model {held:.0f} MiB, one activation of all batches {hidden:.0f} MiB")
    print(f"one forward pass over the calibration set: {passes:.2f} s")
    for kind in (Magnitude, TinyWanda, Recorded):
        report(kind, make(**given)[0], batches, passes)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"process at its peak: {most:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
