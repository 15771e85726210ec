"""What one-shot pruning costs next to forward passes, and what it allocates beyond the model.

    python -m tests.benchmarks.bench_prune --write

A Llama of eight layers, 2:4, batches of four rows of 256 tokens. Time: the whole call of Wanda, with
its capture, against plain forward passes over the same batches, in turns, medians, in seconds of the
clock and of all threads. What does not grow with the data is told apart by a straight line through
all sizes. Memory: bytes of tensors at the peak, as torch's allocator counts them, against an account
that does not know how pruning works (`tests.pruning.peak_memory`): the masks, which are part of the
result, two Gram matrices (or sums of squares) of the widest weight, and what lives of the
activations when all batches go through the dense model node by node. Resident memory is what the
kernel saw (VmHWM), with the captured graph, torch's own and what the C library keeps.
"""

import argparse
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fx_sparsity as fxs
from fx_sparsity._native import PRUNING
from fx_sparsity.pruning import PruningReport
from fx_sparsity.pruning.methods import CalibratedSparsifier, ReorderedSparseGPTSparsifier, Swaps
from tests.benchmarks.bench_masks import machine
from tests.pruning.peak_memory import live_activations, mask_bytes, peak_bytes

TABLE = Path(__file__).with_name("prune.txt")
LAYERS, ROWS, TOKENS, MIB = 8, 4, 256, 2**20
SMALL = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408}
USUAL = 128 * 2048
"""Tokens of the calibration sets of the papers: 128 sequences of 2048 (arXiv 2306.11695)."""
METHODS: dict[str, Callable[[], CalibratedSparsifier]] = {
    "Wanda": fxs.WandaSparsifier,
    "SparseGPT": fxs.SparseGPTSparsifier,
    "composed": lambda: fxs.Pipeline(ReorderedSparseGPTSparsifier(), Swaps()),
}


class Seconds(NamedTuple):
    """Of the clock, and of all threads."""

    wall: float
    cpu: float


class Cost(NamedTuple):
    """One size of the calibration set."""

    tokens: int
    forward: Seconds
    prune: Seconds

    @property
    def ratio(self) -> float:
        return self.prune.wall / self.forward.wall

    def line(self) -> str:
        return (
            f"{self.tokens:<9}{self.forward.wall:>8.2f}{self.prune.wall:>8.2f}{self.ratio:>7.2f}"
            f"{self.forward.cpu:>11.2f}{self.prune.cpu:>8.2f}"
            f"{self.prune.cpu / self.forward.cpu:>7.2f}"
        )


def make(batches: int, layers: int = LAYERS) -> tuple[LlamaForCausalLM, list[dict[str, Any]]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=TOKENS,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, SMALL["vocab_size"], (batches, ROWS, TOKENS))
    return model, [{"input_ids": batch} for batch in ids]


@torch.no_grad()
def forward(model: torch.nn.Module, batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        model(**batch)


def prune(model: torch.nn.Module, method: str, batches: list[dict[str, Any]]) -> PruningReport:
    mapping = fxs.SparsityMapping().set_global("2:4")
    return fxs.prune(model, METHODS[method](), batches, mapping, progress=False)[1]


def seconds(call: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def medians(times: list[Seconds]) -> Seconds:
    return Seconds(*(statistics.median(column) for column in zip(*times, strict=True)))


def measure_time(batches: int, runs: int) -> Cost:
    forwards, prunes = [], []
    for _ in range(runs):
        model, data = make(batches)
        forwards.append(seconds(lambda: forward(model, data)))  # noqa: B023
        prunes.append(seconds(lambda: prune(model, "Wanda", data)))  # noqa: B023
    return Cost(batches * ROWS * TOKENS, medians(forwards), medians(prunes))


def line_through(costs: list[Cost]) -> tuple[float, float, float]:
    """(seconds that do not grow with the data, forward passes that do, seconds of one a token)."""
    walls = [cost.prune.wall for cost in costs]
    passes = [cost.forward.wall for cost in costs]
    slope, fixed = statistics.linear_regression(passes, walls)
    return fixed, slope, statistics.mean(cost.forward.wall / cost.tokens for cost in costs)


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Memory(NamedTuple):
    """One method: bytes at the peak beyond the model, and the parts of the account."""

    method: str
    tensors: int
    masks: int
    statistics: int
    activations: int
    resident: int

    @property
    def allowed(self) -> int:
        return self.masks + 2 * self.statistics + self.activations

    def line(self) -> str:
        sizes = (
            self.masks,
            2 * self.statistics,
            self.activations,
            self.allowed,
            self.tensors,
        )
        cells = "".join(f"{size / MIB:>13.1f}" for size in sizes)
        return (
            f"{self.method:<11}{cells}{self.tensors / self.allowed:>8.2f}"
            f"{self.resident / MIB:>10.0f}"
        )


def measure_memory(method: str, batches: int) -> Memory:
    model, data = make(batches)
    live = live_activations(model, data)
    tensors, _ = peak_bytes(lambda: prune(model, method, data))
    model, data = make(batches)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    start = resident("VmRSS")
    prune(model, method, data)
    widest = SMALL["intermediate_size"]
    sums = widest if method == "Wanda" else widest**2
    return Memory(method, tensors, mask_bytes(model), 4 * sums + 8, live, resident("VmHWM") - start)


def verdicts(costs: list[Cost], memories: list[Memory]) -> Iterator[str]:
    """What was to be reached, and what was."""
    if len(costs) > 1:
        yield from _time_verdicts(costs)
    if memories:
        worst = max(memory.tensors / memory.allowed for memory in memories)
        yield f"at most masks, 2 statistics and activations: {worst:.2f} of it; {_met(worst <= 1)}"


def _time_verdicts(costs: list[Cost]) -> Iterator[str]:
    fixed, slope, a_token = line_through(costs)
    usual = slope + fixed / (a_token * USUAL)
    yield f"Wanda: {fixed:.2f} s, mostly the capture, and {slope:.2f} forward passes over the data"
    if slope < 1.5:
        least = fixed / (a_token * (1.5 - slope))
        yield f"at most 1.5 forward passes: from {max(0, round(least, -2)):.0f} tokens on, by that line"
    measured = [cost.tokens for cost in costs if cost.ratio <= 1.5]
    yield f"measured: {'from ' + str(min(measured)) + ' tokens on' if measured else 'at no size'}"
    yield f"at the usual {USUAL} tokens, by that line: {usual:.2f}; {_met(usual <= 1.5)}"


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def main(arguments: list[str] | None = None) -> tuple[list[Cost], list[Memory]]:
    """Measure, print, and write the table if asked to."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_prune")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument(
        "--held", type=int, default=4, help="batches where memory is measured; 0: not"
    )
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    lines: list[str] = []

    def say(*texts: str) -> None:
        lines.extend(texts)
        print(*texts, sep="\n", flush=True)

    for method in METHODS:  # whatever is loaded, built and kept once
        prune(make(1, layers=1)[0], method, make(1)[1])
    say(
        f"{machine(PRUNING, 'seconds')}; pruning of a whole model", f"median of {options.runs} runs"
    )
    say("", f"{'Wanda':<9}{'clock:':>8}{'':15}{'all threads:':>11}")
    say(
        f"{'tokens':<9}{'forward':>8}{'prune':>8}{'ratio':>7}{'forward':>11}{'prune':>8}{'ratio':>7}"
    )
    costs, memories = [], []
    for batches in options.batches:
        costs.append(measure_time(batches, options.runs))
        say(costs[-1].line())
    tokens = options.held * ROWS * TOKENS
    model = sum(p.nbytes for p in make(1)[0].parameters()) / MIB
    say("", f"MiB at the peak beyond the model's {model:.0f}, {tokens} tokens", "")
    names = ("masks", "2 statistics", "activations", "allowed", "tensors")
    say(f"{'method':<11}" + "".join(f"{n:>13}" for n in names) + f"{'share':>8}{'resident':>10}")
    for method in METHODS if options.held else ():
        memories.append(measure_memory(method, options.held))
        say(memories[-1].line())
    say("", *verdicts(costs, memories))
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")
    return costs, memories


if __name__ == "__main__":
    main()
