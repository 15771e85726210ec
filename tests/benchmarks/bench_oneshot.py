"""One-shot pruning: time next to a plain SparseGPT, and what each method leaves of a layer's error.

    python -m tests.benchmarks.bench_oneshot --write

The reference is the published algorithm (arXiv 2301.00774) written down in torch, float32, as one
reads it: two Cholesky factors and an inverse, a sort for each threshold, a loop over columns.
Candidates take turns; medians. Errors are ||(W - V) X||^2 without damping, in float64, as shares of
SparseGPT's (ours) on the same layer; layers have correlated inputs of two kinds, made up here.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fx_sparsity._native import PRUNING
from fx_sparsity.patterns import Pattern
from fx_sparsity.pruning.methods import (
    ALPS,
    CalibratedSparsifier,
    ExactUpdate,
    MagnitudeSparsifier,
    Pipeline,
    ReorderedSparseGPTSparsifier,
    SparseGPTSparsifier,
    Statistics,
    Swaps,
    WandaSparsifier,
)
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("oneshot.txt")
PATTERNS = ["unstructured", "2:4"]
METHODS: dict[str, CalibratedSparsifier] = {
    "magnitude": MagnitudeSparsifier(),
    "Wanda": WandaSparsifier(),
    "SparseGPT": SparseGPTSparsifier(),
    "reordered": ReorderedSparseGPTSparsifier(),
    "composed": Pipeline(ReorderedSparseGPTSparsifier(), Swaps()),
    "converged": Pipeline(ReorderedSparseGPTSparsifier(), Swaps(), ExactUpdate()),
    "ALPS": ALPS(),
}
SLOW = ("converged", "ALPS")
"""Run once, and not on the largest layers."""


@dataclass(frozen=True)
class Speed:
    """Seconds of the reference, of ours in C++ and of ours in plain torch."""

    size: int
    pattern: str
    reference: float
    native: float
    plain: float

    def line(self) -> str:
        return (
            f"{self.size:<7}{self.pattern:<14}{self.reference:>11.3f}{self.native:>8.3f}"
            f"{self.reference / self.native:>7.1f}{self.plain:>8.3f}"
            f"{self.reference / self.plain:>7.1f}"
        )


@dataclass(frozen=True)
class Quality:
    """Of one layer and method: its error and its time, as shares of SparseGPT's."""

    size: int
    inputs: str
    pattern: str
    errors: dict[str, float]
    times: dict[str, float]

    def line(self) -> str:
        cells = [f"{self.errors[name]:>8.3f}{self.times[name]:>7.2f}" for name in self.errors]
        return f"{self.size:<7}{self.inputs:<8}{self.pattern:<14}" + "".join(cells)


def layer(size: int, inputs: str, seed: int = 0) -> tuple[Tensor, Statistics]:
    """A weight [1, size, size], and the Gram matrix of eight tokens an input.

    "mixed": normal inputs mixed with one another. "power": principal components whose standard
    deviations fall as 1/sqrt(rank). The inputs of both are of unequal size.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight, x = normal(1, size, size) * 0.05, normal(8 * size, size)
    if inputs == "mixed":
        x = x @ (normal(size, size) * 0.7 / size**0.5 + torch.eye(size))
    else:
        x *= torch.arange(1, size + 1) ** -0.5
        x = x @ torch.linalg.qr(normal(size, size)).Q.t()
    x *= torch.exp(0.5 * normal(size))
    squares = x.square().sum(0, keepdim=True)
    return weight, Statistics(torch.tensor([len(x)]), squares=squares, gram=(x.t() @ x)[None])


def reference(weight: Tensor, gram: Tensor, pattern: str, level: float) -> Tensor:
    """SparseGPT as one reads it; gives the updated weight."""
    w, h = weight.clone(), gram.clone()
    size = len(h)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, size, 128):
        stop = min(start + 128, size)
        block, kept = w[:, start:stop].clone(), torch.zeros_like(w[:, start:stop])
        errors, corner = torch.zeros_like(block), u[start:stop, start:stop]
        mask = torch.zeros_like(block, dtype=torch.bool)
        if pattern == "unstructured":
            costs = block**2 / corner.diagonal() ** 2
            mask = costs <= costs.flatten().sort().values[int(costs.numel() * level)]
        for i in range(stop - start):
            column, d = block[:, i], corner[i, i]
            if pattern == "2:4" and i % 4 == 0:
                costs = block[:, i : i + 4] ** 2 / corner.diagonal()[i : i + 4] ** 2
                mask.scatter_(1, i + costs.topk(2, dim=1, largest=False).indices, True)
            q = column.clone()
            q[mask[:, i]] = 0
            kept[:, i] = q
            error = (column - q) / d
            block[:, i:] -= error[:, None] @ corner[i, i:][None]
            errors[:, i] = error
        w[:, start:stop] = kept
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w


def plain(work: Callable[[], object]) -> Callable[[], object]:
    """The same without C++ operators."""

    def without() -> object:
        before = os.environ.get("FX_SPARSITY_KERNELS")
        os.environ["FX_SPARSITY_KERNELS"] = "0"
        try:
            return work()
        finally:
            if before is None:
                del os.environ["FX_SPARSITY_KERNELS"]
            else:
                os.environ["FX_SPARSITY_KERNELS"] = before

    return without


def medians(candidates: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Seconds; every candidate once to warm up, then in turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in range(runs + 1):
        for name, work in candidates.items():
            start = time.perf_counter()
            work()
            if run:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_speed(size: int, pattern: str, runs: int) -> Speed:
    weight, stats = layer(size, "mixed")
    assert stats.gram is not None
    tiling = Pattern.parse(pattern).tiling(weight.shape, ("batch", "out", "in"))
    ours, gram = SparseGPTSparsifier(), stats.gram[0]

    def solve() -> object:
        return ours.solve(weight, stats, tiling, 0.5)

    theirs = error(weight[0], reference(weight[0], gram, pattern, 0.5), gram)
    same = error(weight[0], ours.solve(weight, stats, tiling, 0.5).weight[0], gram)
    # The published threshold takes one weight more from each stretch of columns.
    assert abs(same / theirs - 1) < 0.01, "the reference and ours do not agree"
    times = medians(
        {
            "reference": lambda: reference(weight[0], gram, pattern, 0.5),
            "native": solve,
            "plain": plain(solve),
        },
        runs,
    )
    return Speed(size, pattern, times["reference"], times["native"], times["plain"])


def error(weight: Tensor, solved: Tensor, gram: Tensor) -> float:
    difference = (weight - solved).double()
    return float(((difference @ gram.double()) * difference).sum())


def measure_quality(size: int, inputs: str, pattern: str, runs: int) -> Quality:
    weight, stats = layer(size, inputs)
    assert stats.gram is not None
    tiling = Pattern.parse(pattern).tiling(weight.shape, ("batch", "out", "in"))
    errors: dict[str, float] = {}

    def solve(name: str) -> None:
        solved = METHODS[name].solve(weight, stats, tiling, 0.5)
        if name not in errors:
            errors[name] = error(weight[0], solved.weight[0], stats.gram[0])  # type: ignore[index]

    quick = [name for name in METHODS if name not in SLOW]
    times = medians({name: lambda name=name: solve(name) for name in quick}, runs)  # type: ignore[misc]
    for name in SLOW if size <= 1024 else ():
        start = time.perf_counter()
        solve(name)
        times[name] = time.perf_counter() - start
    return Quality(
        size,
        inputs,
        pattern,
        {name: value / errors["SparseGPT"] for name, value in errors.items()},
        {name: value / times["SparseGPT"] for name, value in times.items()},
    )


def verdicts(speeds: list[Speed], qualities: list[Quality]) -> Iterator[str]:
    """What was to be reached, and what was."""
    slowest = min(s.reference / s.native for s in speeds)
    yield f"SparseGPT at least 3 times the plain reference's speed: {slowest:.1f}; {_met(slowest >= 3)}"
    chosen = [q for q in qualities if q.pattern == "2:4"]
    mean = statistics.mean(q.errors["composed"] for q in chosen)
    yield f"2:4, composed: at most 0.8 of SparseGPT's error on average: {mean:.3f}; {_met(mean <= 0.8)}"
    longest = max(q.times["composed"] for q in chosen)
    yield f"2:4, composed: at most 4 times its time: {longest:.1f}; {_met(longest <= 4)}"
    worst = min(q.errors["Wanda"] for q in chosen)
    yield f"2:4, SparseGPT: an error below Wanda's: Wanda's is at least {worst:.2f}; {_met(worst > 1)}"
    marks = [(q.errors["ALPS"], q.times["ALPS"]) for q in chosen if "ALPS" in q.errors]
    published, slower = (statistics.mean(values) for values in zip(*marks, strict=True))
    yield f"2:4, the published mark, ALPS: {published:.3f} on average, at {slower:.0f} times its time"


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def main(arguments: list[str] | None = None) -> tuple[list[Speed], list[Quality]]:
    """Measure, print, and write the tables if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_oneshot")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="small layers, to try it out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    lines: list[str] = []

    def say(*texts: str) -> None:
        lines.extend(texts)
        print(*texts, sep="\n", flush=True)

    say(f"{machine(PRUNING, 'seconds')}; one-shot pruning", f"median of {options.runs} runs")
    say("", "SparseGPT, 50%", "")
    say(
        f"{'size':<7}{'pattern':<14}{'reference':>11}{'C++':>8}{'times':>7}{'plain':>8}{'times':>7}"
    )
    speeds, qualities = [], []
    for size in [64] if options.small else [1024, 2048, 4096]:
        for pattern in PATTERNS:
            speeds.append(measure_speed(size, pattern, options.runs))
            say(speeds[-1].line())
    say("", "errors, and times after them, as shares of SparseGPT's; 50%", "")
    say(f"{'size':<7}{'inputs':<8}{'pattern':<14}" + "".join(f"{name:>15}" for name in METHODS))
    for size in [64] if options.small else [512, 1024, 2048]:
        for inputs in ("mixed", "power"):
            for pattern in PATTERNS:
                qualities.append(measure_quality(size, inputs, pattern, options.runs))
                say(qualities[-1].line())
    say("", *verdicts(speeds, qualities))
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")
    return speeds, qualities


if __name__ == "__main__":
    main()
