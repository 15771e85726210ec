"""4-bit weights next to torch's own product of them, and next to a dense one of ours.

    python -m tests.benchmarks.bench_int4 --write --check
    python -m tests.benchmarks.bench_int4 --row "2:4 int8"

4096x4096, groups of 64, scales in bf16, one token and four. Of a row, ours, torch's
`_weight_int4pack_mm_for_cpu` and our own dense form take turns in one run, in another order each
time, each with another copy of its weight, so that none finds it in the cache; speeds are medians
of the ratios of one round. All are operators, without the modules around them. `stream` is bytes
over time, as a share of the best rate at which torch read 8 MiB out of 256 in the same run.
`--write` keeps rows that were measured before, so that a run which was cut short is taken up again
by naming the rows that are missing.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fx_sparsity._native import KERNELS
from fx_sparsity.kernels import SparseLinear
from fx_sparsity.kernels.pages import use_large_pages
from tests.benchmarks.bench_linear import Run, blocks, operator, two_of_four, unstructured
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("int4.txt")
SIZE, GROUP = 4096, 64
TOKENS = (1, 4)
QUANTIZERS = {"int8": "token_symmetric", "bf16": "none"}
"""Activations -> what the operator is asked for."""


@dataclass(frozen=True)
class Row:
    """A packing, its zeros, and what is asked of it.

    Attributes:
        packing: of `INT4`.
        zeros: what makes zeros of a weight.
        sparsity: how many.
        torch: activations -> times torch's speed at one token, and at four.
        dense: times our own dense form at one token, with int8 activations; None for no bar.
        percent: most bytes, of those of our own dense form; None for no bar.
    """

    packing: str
    zeros: Callable[[Tensor, float], Tensor]
    sparsity: float
    torch: dict[str, tuple[float, float]]
    dense: float | None = None
    percent: float | None = None


def none(weight: Tensor, sparsity: float) -> Tensor:
    """No zeros."""
    return weight


ROWS = {
    "dense": Row("dense_int4", none, 0, {"int8": (1.8, 2.4), "bf16": (1.8, 1.4)}),
    "50%": Row(
        "bitmask_int4", unstructured, 0.5, {"int8": (1.9, 2.2), "bf16": (1.5, 1.4)}, percent=75
    ),
    "70%": Row("bitmask_int4", unstructured, 0.7, {"int8": (2.3, 2.4), "bf16": (1.6, 1.4)}, 1.2),
    "2:4": Row(
        "nm_int4", two_of_four, 0.5, {"int8": (2.5, 2.6), "bf16": (1.6, 1.4)}, 1.25, percent=75
    ),
    "32x32 50%": Row("block_int4", blocks(32, 32), 0.5, {}, 1.6),
}
NAMES = [f"{name} {inputs}" for name in ROWS for inputs in QUANTIZERS]
HEADER = (
    f"{'zeros':<11}{'inputs':<8}{'M':<4}{'MB':>7}{'% dense':>9}{'ms':>8}{'stream':>8}"
    f"{'torch':>8}{'bar':>6}{'dense':>8}{'bar':>6}"
)


def codes(row: Row) -> Tensor:
    """Codes from -7 to 7, zeros where the row has them alone."""
    torch.manual_seed(0)
    weight = row.zeros(torch.randn(SIZE, SIZE), row.sparsity)
    size = torch.randint(1, 8, weight.shape)
    return (size * weight.sign()).to(torch.int8)


def ours(row: Row, inputs: str, copies: int) -> tuple[list[Run], int]:
    """Runs, each with a copy of the weight; and the bytes of one."""
    scale = (torch.rand(SIZE, SIZE // GROUP) * 0.01 + 0.001).bfloat16()
    layer = SparseLinear.from_dense(
        codes(row), packing=row.packing, scale=scale, quantize_input=QUANTIZERS[inputs]
    )
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
    return [operator(layer) for layer in layers], layer.nbytes


def torchs(copies: int) -> list[Run]:
    """Torch's product."""
    scales = torch.rand(SIZE // GROUP, SIZE, 2).bfloat16()

    def made() -> Run:
        values = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32)
        ahead = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, ahead, GROUP, scales)

    return [made() for _ in range(copies)]


@torch.inference_mode()
def measure(forms: dict[str, list[Run]], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Form -> milliseconds of each round."""
    x = torch.randn(tokens, SIZE).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(-2, rounds):
        order = list(forms)
        first = i % len(order)
        for name in [*order[first:], *order[:first]]:
            run = forms[name][i % len(forms[name])]
            start = time.perf_counter()
            run(x)
            elapsed = time.perf_counter() - start
            if i >= 0:
                times[name].append(1000 * elapsed)
    return times


def stream() -> float:
    """Bytes a millisecond that norms of 8 MiB read, in large pages and from memory, at best."""
    values = torch.ones(64 << 20)
    use_large_pages(values)
    best = float("inf")
    for _ in range(3):
        for piece in values.split(2 << 20):
            start = time.perf_counter()
            torch.linalg.vector_norm(piece)
            best = min(best, 1000 * (time.perf_counter() - start))
    return (8 << 20) / best


def times_faster(other: Sequence[float], own: Sequence[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(o / t for o, t in zip(other, own, strict=True))


@dataclass(frozen=True)
class Cell:
    """A figure, and what is asked of it."""

    value: float
    bar: float | None
    most: bool = False

    @property
    def met(self) -> bool:
        """True where nothing is asked."""
        if self.bar is None:
            return True
        return self.value <= self.bar if self.most else self.value >= self.bar

    @property
    def asked(self) -> str:
        """Such as `1.8`, `1.8!` where it is missed, or nothing."""
        return "" if self.bar is None else f"{self.bar:g}{'' if self.met else '!'}"


def lines(name: str, rounds: int, copies: int) -> list[tuple[str, bool]]:
    """The lines of a row, and whether their bars are met."""
    zeros, _, inputs = name.rpartition(" ")
    row = ROWS[zeros]
    own, nbytes = ours(row, inputs, copies)
    dense, dense_bytes = ours(ROWS["dense"], inputs, copies)
    forms = {"ours": own, "torch": torchs(copies), "dense": dense}
    rate = stream()
    found = []
    for place, tokens in enumerate(TOKENS):
        times = measure(forms, tokens, rounds)
        took = statistics.median(times["ours"])
        against_torch = Cell(
            times_faster(times["torch"], times["ours"]),
            row.torch[inputs][place] if inputs in row.torch else None,
        )
        judged = row.dense if (tokens, inputs) == (1, "int8") else None
        against_dense = Cell(times_faster(times["dense"], times["ours"]), judged)
        percent = Cell(100 * nbytes / dense_bytes, row.percent, most=True)
        cells = (against_torch, against_dense, percent)
        found.append(
            (
                f"{zeros:<11}{inputs:<8}{tokens:<4}{nbytes / 1e6:>7.2f}"
                f"{f'{percent.value:.1f}' + ('' if percent.met else '!'):>9}{took:>8.3f}"
                f"{nbytes / took / rate:>8.0%}{against_torch.value:>8.2f}{against_torch.asked:>6}"
                f"{against_dense.value:>8.2f}{against_dense.asked:>6}".rstrip(),
                all(cell.met for cell in cells),
            )
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the table if asked to; the exit status tells of bars with --check."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_int4")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--list", action="store_true", help="name the rows, and do not run")
    parser.add_argument("--row", choices=NAMES, action="append", help="only this one")
    parser.add_argument("--write", action="store_true", help="write the table; others' rows stay")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--copies", type=int, default=16, help="of each weight")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(NAMES))
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    head = [machine(KERNELS), f"medians of {options.rounds} rounds; ! misses its bar", "", HEADER]
    print("\n".join(head), flush=True)
    held: dict[str, list[str]] = {}
    if options.write and TABLE.exists():
        for line in TABLE.read_text().splitlines()[len(head) :]:
            held.setdefault(f"{line[:11].strip()} {line[11:19].strip()}", []).append(line)
    met = True
    for name in options.row or NAMES:
        found = lines(name, options.rounds, options.copies)
        met &= all(ok for _, ok in found)
        held[name] = [line for line, _ in found]
        print("\n".join(held[name]), flush=True)
        if options.write:
            rows = [line for known in NAMES for line in held.get(known, [])]
            TABLE.write_text("\n".join([*head, *rows]) + "\n")
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
