"""Time and memory of a sparsifier's whole `step()`, next to that of `torch.ao.pruning`.

    python -m tests.benchmarks.bench_masks --write
    python -m tests.benchmarks.bench_masks --row 4096x11008/f32/1x4/0.5 --row bf16/2:4

Reference and ours take turns on the same weight, which changes in place between steps; medians.
`clone` is `weight.clone()`, which faults new pages in; `copy` writes to memory that is there
already. Boolean masks are those of the graph pass; the classic ones have the weight's dtype.
"""

import argparse
import ctypes
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier as ReferenceWeightNorm
from torch.ao.pruning._experimental.data_sparsifier import DataNormSparsifier as ReferenceDataNorm

import fx_sparsity
from fx_sparsity._native import MASKS, Library

TABLE = Path(__file__).with_name("masks.txt")
SHAPES = [(4096, 4096), (4096, 11008), (1_000_000, 64)]
BLOCKS = [(1, 1), (1, 4), (4, 4), (16, 16), (32, 32)]
MOST_CLONES = {torch.float32: 5.0, torch.bfloat16: 8.0}
HEADER = (
    f"{'weight':<12}{'dtype':<6}{'pattern':<10}{'level':<6}"
    f"{'ao weight':>10}{'ours':>8}{'times':>7}"
    f"{'ao data':>10}{'ours':>8}{'times':>7}"
    f"{'boolean':>9}{'/clone':>8}{'/copy':>7}{'2:4':>6}{'memory':>8}"
)


@dataclass(frozen=True)
class Cell:
    """One line of the table: a weight, and what a sparsifier is asked to do to it."""

    shape: tuple[int, int]
    dtype: torch.dtype
    block: tuple[int, int]
    level: float
    zeros: int

    @property
    def pattern(self) -> str:
        if self.zeros < self.block[0] * self.block[1]:
            return f"{self.block[1] - self.zeros}:{self.block[1]}"
        return f"{self.block[0]}x{self.block[1]}"

    @property
    def row(self) -> str:
        """Its name, as `--row` takes it or a part of it."""
        dtype = str(self.dtype)[6:].replace("float", "f")
        return f"{'x'.join(map(str, self.shape))}/{dtype}/{self.pattern}/{self.level}"

    @property
    def options(self) -> dict[str, object]:
        return {
            "sparsity_level": self.level,
            "sparse_block_shape": self.block,
            "zeros_per_block": self.zeros,
        }


@dataclass(frozen=True)
class Result:
    """Medians in milliseconds, and peak extra memory over the weight's bytes."""

    cell: Cell
    weight: tuple[float, float]
    data: tuple[float, float]
    boolean: float
    clone: float
    copy: float
    memory: float

    @property
    def times(self) -> list[float]:
        return [reference / ours for reference, ours in (self.weight, self.data)]

    @property
    def slowest(self) -> float:
        return max(self.weight[1], self.data[1])

    def line(self) -> str:
        shape, dtype, pattern, level = self.cell.row.split("/")
        is_24 = pattern == "2:4"
        return (
            f"{shape:<12}{dtype:<6}{pattern:<10}{level:<6}"
            f"{self.weight[0]:>10.0f}{self.weight[1]:>8.1f}{self.times[0]:>7.0f}"
            f"{self.data[0]:>10.0f}{self.data[1]:>8.1f}{self.times[1]:>7.0f}"
            f"{self.boolean:>9.1f}{self.slowest / self.clone:>8.1f}{self.slowest / self.copy:>7.1f}"
            f"{f'{self.boolean / self.clone:.1f}' if is_24 else '':>6}{self.memory:>8.2f}"
        )


def cells(shapes: list[tuple[int, int]]) -> Iterator[Cell]:
    """Every line, weight by weight."""
    for shape in shapes:
        for dtype in MOST_CLONES:
            for level in (0.5, 0.9):
                for block in BLOCKS:
                    yield Cell(shape, dtype, block, level, block[0] * block[1])
            yield Cell(shape, dtype, (1, 4), 1.0, 2)


class Model(nn.Module):
    """A model of one weight; its layer is never called."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False, device="meta")
        self.layer.weight = nn.Parameter(weight)


def weight_step(kind: type, cell: Cell, weight: Tensor, boolean: bool) -> Callable[[], None]:
    """The step of a model-bound sparsifier."""
    model = Model(weight)
    sparsifier = kind(**cell.options)
    sparsifier.prepare(model, [{"tensor_fqn": "layer.weight"}])
    if boolean:
        holder = model.layer.parametrizations.weight[0]
        holder.mask = holder.mask.bool()
    return sparsifier.step


def data_step(kind: type, cell: Cell, weight: Tensor) -> Callable[[], None]:
    """The step of a data sparsifier, over the same memory."""
    sparsifier = kind(**cell.options)
    sparsifier.add_data(name="weight", data=nn.Parameter(weight))
    return sparsifier.step


def peak(work: Callable[[], None]) -> int:
    """Bytes by which resident memory grew at most while `work` ran."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def measure(cell: Cell, reference_runs: int, runs: int) -> Result:
    """Take turns: every candidate once, then all again; the reference only in its first runs."""
    torch.manual_seed(0)
    weight = torch.randn(cell.shape).to(cell.dtype)
    target = torch.empty_like(weight)
    candidates: dict[str, Callable[[], object]] = {
        "weight": weight_step(fx_sparsity.WeightNormSparsifier, cell, weight, False),
        "data": data_step(fx_sparsity.DataNormSparsifier, cell, weight),
        "boolean": weight_step(fx_sparsity.WeightNormSparsifier, cell, weight, True),
        "clone": weight.clone,
        "copy": lambda: target.copy_(weight),
    }
    references: dict[str, Callable[[], object]] = {
        "ao weight": weight_step(ReferenceWeightNorm, cell, weight, False),
        "ao data": data_step(ReferenceDataNorm, cell, weight),
    }
    for work in candidates.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in [*candidates, *references]}
    for run in range(runs):
        for name, work in [
            *candidates.items(),
            *(references.items() if run < reference_runs else ()),
        ]:
            weight.mul_(1.01 if run % 2 else 0.99)
            start = time.perf_counter()
            result = work()
            times[name].append(1000 * (time.perf_counter() - start))
            del result
    medians = {name: statistics.median(values) for name, values in times.items()}
    memory = max(peak(candidates[name]) for name in ("weight", "data", "boolean"))  # type: ignore[arg-type]
    return Result(
        cell,
        (medians["ao weight"], medians["weight"]),
        (medians["ao data"], medians["data"]),
        medians["boolean"],
        medians["clone"],
        medians["copy"],
        memory / (weight.numel() * weight.element_size()),
    )


def verdicts(results: list[Result]) -> Iterator[str]:
    """What was to be reached, what was, and which lines fall short."""

    def bar(name: str, reached: str, missed: list[Result]) -> str:
        lines = [r.cell.row for r in missed]
        return f"{name}: {reached}; " + (f"MISSED by {'; '.join(lines)}" if lines else "met")

    times = [value for result in results for value in result.times]
    slow = [r for r in results if min(r.times) < 40]
    yield bar("at least 40 times torch.ao in every cell", f"{min(times):.0f}", slow)
    middle = statistics.median(times)
    yield f"100 times in the median: {middle:.0f}; {'met' if middle >= 100 else 'MISSED'}"
    for unit in ("clone", "copy"):
        for dtype, most in MOST_CLONES.items():
            chosen = [r for r in results if r.cell.dtype == dtype]
            if not chosen:
                continue
            ratios = [r.slowest / getattr(r, unit) for r in chosen]
            over = [r for r, ratio in zip(chosen, ratios, strict=True) if ratio > most]
            yield bar(f"at most {most:g} {unit} in {dtype}", f"{max(ratios):.2f}", over)
        chosen = [r for r in results if r.cell.pattern == "2:4"]
        if chosen:
            ratios = [r.boolean / getattr(r, unit) for r in chosen]
            over = [r for r, ratio in zip(chosen, ratios, strict=True) if ratio > 2]
            yield bar(f"2:4 with boolean masks at most 2 {unit}", f"{max(ratios):.2f}", over)
    heavy = [r for r in results if r.memory > 0.7]
    most = max(r.memory for r in results)
    yield bar("at most 0.7 of the weight in extra memory", f"{most:.2f}", heavy)


def machine(library: Library = MASKS, unit: str = "milliseconds") -> str:
    """The processor by name, its cores, torch, and which path is measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = (
        f"{facts.get('model name')} (family {facts.get('cpu family')}, model {facts.get('model')})"
    )
    path = "C++ kernels" if library.ready() else library.state()[1]
    return (
        f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; "
        f"torch {torch.__version__}; {path}; times in {unit}; "
        f"load {os.getloadavg()[0]:.1f} from elsewhere at the start"
    )


def main(arguments: list[str] | None = None) -> list[Result]:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_masks")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--reference-runs", type=int, default=3)
    parser.add_argument("--row", action="append", help="only those whose names have this in them")
    parser.add_argument("--small", action="store_true", help="one small weight, to try it out")
    options = parser.parse_args(arguments)
    if options.row and options.write:
        parser.error("a table is written whole: give --write without --row")
    every = list(cells([(256, 256)] if options.small else SHAPES))
    chosen = [cell for cell in every if any(part in cell.row for part in options.row or [""])]
    if not chosen:
        parser.error(f"no row has that in its name; one is {every[0].row}")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(2)
    lines = [machine(), f"median of {options.reference_runs} and {options.runs} runs", "", HEADER]
    print("\n".join(lines))
    results = []
    for cell in chosen:
        results.append(measure(cell, options.reference_runs, options.runs))
        lines.append(results[-1].line())
        print(lines[-1], flush=True)
    lines += ["", *verdicts(results)]
    print("\n".join(lines[-len(list(verdicts(results))) - 1 :]))
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")
    return results


if __name__ == "__main__":
    main()
