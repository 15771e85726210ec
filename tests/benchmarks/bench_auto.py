"""After `lower(policy="auto")`: is anything slower than dense? Layers of a common size, every dtype.

    python -m tests.benchmarks.bench_auto --write

A model has one linear layer for each way to have zeros. It is lowered for 1, 4, 16 and 64 tokens,
with a table of timings that starts empty; and again with `keep_dense=True`, which keeps both
forms and chooses by the number of tokens. Then every layer that got a kernel takes turns with the
dense model's own layer and with the kernels that torch has for the dtype, weights packed ahead, of
which the fastest counts; two copies of each weight. Speeds are medians of 17 paired rounds. A layer
is called slower where even the fifth best round is, which is so by chance in 2.5% of all cases.
What stays dense is the dense model's own module: there is nothing to measure.
"""

import argparse
import copy
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import fx_sparsity as fxs
from fx_sparsity._native import KERNELS
from fx_sparsity.lowering import timing
from tests.benchmarks.bench_linear import (
    BF16,
    F32,
    SHAPES,
    TOKENS,
    U8,
    Candidate,
    Run,
    activations,
    blocks,
    dense,
    two_of_four,
    unstructured,
)
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("auto.txt")
ZEROS = {
    "50%": (unstructured, 0.5),
    "70%": (unstructured, 0.7),
    "90%": (unstructured, 0.9),
    "2:4": (two_of_four, 0.5),
    "16x4 50%": (blocks(16, 4), 0.5),
    "32x32 50%": (blocks(32, 32), 0.5),
}
QUANTIZED = {
    "int8": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    "int8-only": Int8WeightOnlyConfig(set_inductor_config=False),
}
DTYPES = ("f32", "bf16", *QUANTIZED)
ROUNDS, SURE = 17, 4
CELL = 18
HEADER = (
    f"{'weight':<12}{'dtype':<10}{'zeros':<11}{'chosen':<20}"
    + "".join(f"{f'M={tokens}':<{CELL}}" for tokens in TOKENS)
    + "reason"
)


def layers(shape: tuple[int, int], dtype: str, names: Sequence[str]) -> nn.ModuleDict:
    """A dense model: a layer for each of `names`, out of `ZEROS`."""
    torch.manual_seed(0)
    model = nn.ModuleDict()
    outputs, inputs = shape
    for name in names:
        zeros, sparsity = ZEROS[name]
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        weight = zeros(torch.randn(shape), sparsity)
        layer.weight = nn.Parameter(weight if dtype == "f32" else weight.bfloat16(), False)
        model[name] = layer
    if dtype in QUANTIZED:
        quantize_(model, QUANTIZED[dtype])
    return model.eval()


@dataclass(frozen=True)
class Speed:
    """Dense over lowered: the median, and what it is above and below with 97.5% certainty each."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, dense: Sequence[float], lowered: Sequence[float]) -> "Speed":
        ratios = sorted(d / own for d, own in zip(dense, lowered, strict=True))
        return cls(ratios[SURE], statistics.median(ratios), ratios[-1 - SURE])

    @property
    def slower(self) -> bool:
        """Beyond the noise."""
        return self.high < 1

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """What became of one layer: its speed by tokens, none where it is dense, and the reason."""

    zeros: str
    chosen: str
    speeds: Mapping[int, Speed]
    reason: str


Times = dict[str, list[float]]
"""Name -> seconds of each round."""


@torch.inference_mode()
def measure(candidates: Sequence[Candidate], columns: int) -> dict[int, Times]:
    """Tokens -> times; candidates and copies take turns."""
    times: dict[int, Times] = {}
    for tokens in TOKENS:
        xs = {dtype: activations(tokens, columns, dtype) for dtype in (F32, BF16, U8)}
        times[tokens] = {c.name: [] for c in candidates}
        for i in range(-2, ROUNDS):
            first = i % len(candidates)  # nobody always follows the same one
            for c in [*candidates[first:], *candidates[:first]]:
                run, x = c.runs[i % len(c.runs)], xs[c.x_dtype]
                start = time.perf_counter()
                run(x)
                if i >= 0:
                    times[tokens][c.name].append(time.perf_counter() - start)
    return times


def mkl(weight: Tensor) -> Run:
    """What freezing puts in place of a float32 layer, packed for each number of tokens."""
    ahead = {tokens: torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens) for tokens in TOKENS}
    return lambda x: torch.ops.mkl._mkl_linear(x, ahead[len(x)], weight, None, len(x))


def rows(model: nn.ModuleDict, dtype: str) -> Iterator[Row]:
    """How fast dense is, what `auto` does with every layer, and how fast that is."""
    inputs = F32 if dtype == "f32" else BF16
    reports, ours = {}, []
    pending = list(model)
    for kept in (False, True):
        if not pending:
            break
        lowered, reports[kept] = fxs.lower(
            nn.ModuleDict(model.items()),
            policy=dict.fromkeys(pending, "auto"),
            tokens=TOKENS,
            keep_dense=kept,
        )
        pending = [name for name in pending if reports[kept][f"{name}.weight"].kernel is None]
        for name, layer in lowered.items():
            if reports[kept][f"{name}.weight"].kernel is not None:
                ours.append(Candidate(f"{name}, {kept}", [layer, copy.deepcopy(layer)], inputs))
    own = next(iter(model.values()))
    theirs = [Candidate("own", [own, copy.deepcopy(own)], inputs)]
    if dtype == "f32":
        theirs.append(Candidate("mkl", [mkl(own.weight), mkl(own.weight.clone())], inputs))
    theirs += [c for c in dense(dtype, torch.randn(own.weight.shape), 2) if c.name != "int4"]
    times = measure([*ours, *theirs], own.in_features)
    best = {
        tokens: min((c.name for c in theirs), key=lambda name: statistics.median(taken[name]))
        for tokens, taken in times.items()
    }
    milliseconds = {t: 1e3 * statistics.median(times[t][name]) for t, name in best.items()}
    fastest = ", ".join(f"{milliseconds[t]:.3f} ms {name}" for t, name in best.items())
    yield Row("any", "dense", {}, f"the fastest at each: {fastest}")
    for name in model:
        for kept, report in reports.items():
            row = report[f"{name}.weight"]
            if kept and row.up_to is None:
                continue
            limit = row.up_to or max(TOKENS)
            speeds = {
                tokens: Speed.of(taken[best[tokens]], taken[f"{name}, {kept}"])
                for tokens, taken in times.items()
                if row.kernel is not None and tokens <= limit
            }
            chosen = row.kernel or "dense"
            chosen += f" up to {limit}" if kept else ""
            yield Row(name, chosen, speeds, row.reason or f"measured {row.gains}")


def line(shape: tuple[int, int], dtype: str, row: Row) -> str:
    cells = [f"{row.speeds.get(tokens, 'dense')!s:<{CELL}}" for tokens in TOKENS]
    weight = "x".join(map(str, shape))
    return f"{weight:<12}{dtype:<10}{row.zeros:<11}{row.chosen:<20}{''.join(cells)}{row.reason}"


def merged(before: Sequence[str], table: Sequence[str]) -> list[str]:
    """Lines of another table without what this one has anew, and those; in order."""
    shapes = ["x".join(map(str, shape)) for shape in SHAPES]
    orders = (shapes, list(DTYPES), ["any", *ZEROS])

    def place(text: str) -> tuple[str, ...]:
        return text[:12].rstrip(), text[12:22].rstrip(), text[22:33].rstrip()

    def rank(text: str) -> list[int]:
        parts = zip(place(text), orders, strict=True)
        return [order.index(part) if part in order else len(order) for part, order in parts]

    anew = {place(text) for text in table}
    return sorted([*(text for text in before if place(text) not in anew), *table], key=rank)


def verdict(table: Sequence[str]) -> str:
    """What the lines of a table come to."""
    cells = [cell for text in table for cell in re.findall(r"([\d.]+) \(([\d.]+)-([\d.]+)\)", text)]
    slower = [text for text in table if any(float(c) < 1 for c in re.findall(r"-([\d.]+)\)", text))]
    least = min((float(median) for median, _, _ in cells), default=1.0)
    found = f"{len(cells)} speeds of lowered layers, the least {least:.2f}"
    if slower:
        return "\n".join([f"{found}; SLOWER than dense beyond the noise:", *slower])
    return f"{found}; nothing is slower than dense beyond the noise"


def main(arguments: list[str] | None = None) -> str:
    """Measure, print, and write the table if asked to; the verdict."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_auto")
    parser.add_argument(
        "--write", action="store_true", help=f"write {TABLE.name}, where what is not measured stays"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--shape", help="only this weight, as 4096x4096")
    parser.add_argument("--zeros", nargs="*", choices=ZEROS, default=list(ZEROS), metavar="ZEROS")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    shapes = SHAPES
    if options.shape:
        outputs, inputs = options.shape.split("x")
        shapes = [(int(outputs), int(inputs))]
    head = [
        machine(KERNELS),
        "times faster than the fastest dense form: median (bounds, 97.5% each)",
    ]
    print("\n".join([*head, "", HEADER]), flush=True)
    table = []
    for shape in shapes:
        for dtype in [options.dtype] if options.dtype else DTYPES:
            start = time.perf_counter()
            with (
                tempfile.TemporaryDirectory() as folder,
                patch.object(timing, "folders", lambda folder=folder: [Path(folder)]),
            ):
                for row in rows(layers(shape, dtype, options.zeros), dtype):
                    table.append(line(shape, dtype, row))
                    print(table[-1], flush=True)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
    if options.write:
        before = TABLE.read_text().splitlines() if TABLE.exists() else []
        if before:
            lines = before[before.index(HEADER) + 1 :]
            table = merged(lines[: lines.index("")], table)
        TABLE.write_text("\n".join([*head, "", HEADER, *table, "", verdict(table)]) + "\n")
    print(f"\n{verdict(table)}")
    return verdict(table)


if __name__ == "__main__":
    main()
