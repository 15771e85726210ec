"""ALPS in few iterations: its error next to that of ALPS, its time next to SparseGPT's.

    python -m tests.benchmarks.bench_alps --check

Layers are those of `bench_oneshot`, at 50%. ALPS itself is run once a layer, and not at the sizes
where that would take half an hour; there only the time is judged. Errors are ||(W - V) X||^2
without damping, in float64. SparseGPT and the candidate take turns on one thread, and the time is
the median of the ratios, so that what else the machine does reaches both. The bar of time is for
processors with bfloat16.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fx_sparsity.patterns import Pattern
from fx_sparsity.pruning.methods import (
    ALPS,
    Pipeline,
    QuickALPSSparsifier,
    ReorderedSparseGPTSparsifier,
    SparseGPTSparsifier,
    Swaps,
)
from fx_sparsity.reports import format_table
from tests.benchmarks.bench_oneshot import PATTERNS, error, layer

TABLE = Path(__file__).with_name("alps.txt")
MOST_ABOVE, LONGEST = 1.1, 4.0
BARS = (
    f"the error is at most {MOST_ABOVE:g} times that of ALPS",
    f"the time is at most {LONGEST:g} times that of SparseGPT",
    "the error is below that of reordered SparseGPT with swaps",
)
COMPOSED = Pipeline(ReorderedSparseGPTSparsifier(), Swaps())


class Result(NamedTuple):
    """One layer: errors as shares of SparseGPT's, and the time in times of SparseGPT's."""

    size: int
    inputs: str
    pattern: str
    quick: float
    composed: float
    alps: float | None
    time: float
    seconds: float

    def row(self) -> tuple[str, ...]:
        above = "" if self.alps is None else f"{self.quick / self.alps:.3f}"
        published = "" if self.alps is None else f"{self.alps:.3f}"
        errors = f"{self.quick:.3f}", f"{self.composed:.3f}", published, above
        return str(self.size), self.inputs, self.pattern, *errors, f"{self.time:.2f}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(size: int, inputs: str, pattern: str, runs: int, published: bool) -> Result:
    weight, stats = layer(size, inputs)
    assert stats.gram is not None
    gram = stats.gram[0]
    tiling = Pattern.parse(pattern).tiling(weight.shape, ("batch", "out", "in"))

    def solved(method) -> float:
        return error(weight[0], method.solve(weight, stats, tiling, 0.5).weight[0], gram)

    plain, quick = SparseGPTSparsifier(), QuickALPSSparsifier()
    base, ours, composed = solved(plain), solved(quick), solved(COMPOSED)
    pairs = [
        [seconds(lambda m=m: m.solve(weight, stats, tiling, 0.5)) for m in (quick, plain)]  # type: ignore[misc]
        for _ in range(runs)
    ]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    alps = solved(ALPS()) / base if published else None
    least = min(mine for mine, _ in pairs)
    return Result(size, inputs, pattern, ours / base, composed / base, alps, ratio, least)


def verdicts(results: Sequence[Result]) -> Iterator[tuple[str, bool]]:
    """Each bar with the worst that was measured, and whether it was met."""
    if published := [r.quick / r.alps for r in results if r.alps is not None]:
        yield f"{BARS[0]}: {max(published):.3f}", max(published) <= MOST_ABOVE
    longest = max(r.time for r in results)
    yield f"{BARS[1]}: {longest:.2f}", longest <= LONGEST
    worst = max(r.quick / r.composed for r in results)
    yield f"{BARS[2]}: {worst:.3f} of it", worst < 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_alps")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--list", action="store_true", help="name the bars, and do not run")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--published", type=int, default=2048, help="largest size to run ALPS at")
    options = parser.parse_args(arguments)
    if options.list:
        print(*BARS, sep="\n")
        return 0
    torch.set_num_threads(1)
    results = []
    for size in options.sizes:
        for inputs in ("mixed", "power"):
            for pattern in PATTERNS:
                published = size <= options.published
                results.append(measure(size, inputs, pattern, options.runs, published))
                print(*results[-1].row(), f"{results[-1].seconds:.2f} s", flush=True)
    head = ["size", "inputs", "pattern", "quick", "composed", "ALPS", "quick / ALPS", "time"]
    table = format_table(head, [result.row() for result in results])
    judged = list(verdicts(results))
    lines = [f"{text}; {'met' if met else 'MISSED'}" for text, met in judged]
    about = "errors as shares of SparseGPT's, times in its times; 50%, one thread"
    printed = "\n".join([about, "", table, "", *lines])
    print(printed)
    if options.write:
        TABLE.write_text(printed + "\n")
    return int(options.check and not all(met for _, met in judged))


if __name__ == "__main__":
    sys.exit(main())
