"""After `lower(policy="auto")`: is anything slower than dense? Layers of a common size, every dtype.

    python -m tests.benchmarks.bench_auto --write

A model has one linear layer for each way to have zeros. It is lowered for 1, 4, 16 and 64 tokens,
with a table of timings that starts empty; and once more with `keep_dense=True`, which keeps both
forms and chooses by the number of tokens. Then each layer is timed next to the dense model's own,
and next to the kernels that torch has for the dtype, packed ahead: all of them take turns, with two
copies of each weight. The speeds are medians of paired rounds; a layer is called slower where
even the fifth best of 17 rounds is, which is so by chance in 2.5% of all cases. Where `auto` left a
layer dense it is the dense model's own, so there is nothing to measure.
"""

import argparse
import copy
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
from fx_sparsity.kernels import timing
from fx_sparsity.kernels.native import LIBRARY
from tests.benchmarks.bench_linear import (
    BF16,
    F32,
    SHAPES,
    TOKENS,
    U8,
    Candidate,
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
    "16x4 90%": (blocks(16, 4), 0.9),
    "32x32 50%": (blocks(32, 32), 0.5),
    "32x32 90%": (blocks(32, 32), 0.9),
}
QUANTIZED = {
    "int8": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    "int8-only": Int8WeightOnlyConfig(set_inductor_config=False),
}
DTYPES = ("f32", "bf16", *QUANTIZED)
ROUNDS, SURE = 17, 4
HEADER = (
    f"{'weight':<12}{'dtype':<10}{'zeros':<11}{'chosen':<22}"
    + "".join(f"{f'M={tokens}':<16}" for tokens in TOKENS)
    + "why"
)


def layers(shape: tuple[int, int], dtype: str) -> nn.ModuleDict:
    """A dense model: a layer for each of `ZEROS`."""
    model = nn.ModuleDict()
    outputs, inputs = shape
    for name, (zeros, sparsity) in ZEROS.items():
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        weight = zeros(torch.randn(shape), sparsity)
        layer.weight = nn.Parameter(weight if dtype == "f32" else weight.bfloat16(), False)
        model[name] = layer
    if dtype in QUANTIZED:
        quantize_(model, QUANTIZED[dtype])
    return model.eval()


@dataclass(frozen=True)
class Speed:
    """Dense over lowered: the median, and what it is below and above with 97.5% certainty each."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, dense: Sequence[float], lowered: Sequence[float]) -> "Speed":
        ratios = sorted(d / own for d, own in zip(dense, lowered, strict=True))
        return cls(ratios[SURE], statistics.median(ratios), ratios[-1 - SURE])


@torch.inference_mode()
def measure(
    candidates: Sequence[Candidate], columns: int, rounds: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds of each round by tokens and name; candidates and copies take turns."""
    times: dict[int, dict[str, list[float]]] = {}
    for tokens in TOKENS:
        xs = {dtype: activations(tokens, columns, dtype) for dtype in (F32, BF16, U8)}
        times[tokens] = {c.name: [] for c in candidates}
        for i in range(-2, rounds):
            for c in candidates:
                run, x = c.runs[i % len(c.runs)], xs[c.x_dtype]
                start = time.perf_counter()
                run(x)
                if i >= 0:
                    times[tokens][c.name].append(time.perf_counter() - start)
    return times


@dataclass(frozen=True)
class Row:
    """What became of one layer, and the speeds of it: over its own dense form, over torch's best."""

    zeros: str
    chosen: str
    why: str
    own: Mapping[int, Speed]
    best: Mapping[int, Speed]

    @property
    def slower(self) -> list[str]:
        """Where it is slower than either, beyond the noise."""
        return [
            f"{self.zeros} {self.chosen} at {tokens} tokens: {speed.median:.2f}x of {what}"
            for what, speeds in (("its own dense form", self.own), ("torch's best", self.best))
            for tokens, speed in speeds.items()
            if speed.high < 1
        ]

    def text(self, shape: tuple[int, int], dtype: str) -> str:
        cells = [
            f"{self.own[t].median:.2f} {self.best[t].median:.2f} {self.best[t].low:.2f}"
            if t in self.best
            else "dense"
            for t in TOKENS
        ]
        return (
            f"{shape[0]}x{shape[1]:<{11 - len(str(shape[0]))}}{dtype:<10}{self.zeros:<11}"
            f"{self.chosen:<22}{''.join(f'{cell:<16}' for cell in cells)}{self.why}"
        ).rstrip()


def rows(shape: tuple[int, int], dtype: str, rounds: int) -> Iterator[Row]:
    """What `auto` does with every layer, and how fast that is; with both forms kept below it."""
    torch.manual_seed(0)
    model = layers(shape, dtype)
    inputs = F32 if dtype == "f32" else BF16
    reports, candidates = {}, []
    for kept in (False, True):
        lowered, reports[kept] = fxs.lower(copy.deepcopy(model), tokens=TOKENS, keep_dense=kept)
        for name, layer in lowered.items():
            row = reports[kept][f"{name}.weight"]
            if row.kernel is not None and (not kept or row.up_to is not None):
                runs = [layer, copy.deepcopy(layer)]
                candidates.append(Candidate(f"{name} {kept}", runs, inputs))
    own = model["50%"]
    candidates.append(Candidate("own", [own, copy.deepcopy(own)], inputs))
    torchs = [c for c in dense(dtype, torch.randn(shape), 2) if c.name != "int4"]
    times = measure([*candidates, *torchs], shape[1], rounds)
    for name in ZEROS:
        for kept, report in reports.items():
            row = report[f"{name}.weight"]
            if kept and row.up_to is None:
                continue
            form = f"{name} {kept}"
            chosen = row.kernel or "dense"
            if row.up_to is not None:
                chosen += f" up to {row.up_to}"
            to_own, to_best = {}, {}
            for tokens, taken in times.items():
                if form not in taken or tokens > (row.up_to or tokens):
                    continue
                fastest = min((c.name for c in torchs), key=lambda n: statistics.median(taken[n]))
                best = min(fastest, "own", key=lambda n: statistics.median(taken[n]))
                to_own[tokens] = Speed.of(taken["own"], taken[form])
                to_best[tokens] = Speed.of(taken[best], taken[form])
            why = row.reason or f"measured {row.gains}"
            yield Row(name, chosen, why, to_own, to_best)


def verdict(table: Sequence[str], slower: Sequence[str]) -> str:
    """One line; `slower` are those of this run."""
    if slower:
        return f"SLOWER than dense beyond the noise: {'; '.join(slower)}"
    return f"nothing is slower than dense beyond the noise, in any of {len(table)} rows"


def main(arguments: list[str] | None = None) -> list[str]:
    """Measure, print, and write the table if asked to; what is slower beyond the noise."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_auto")
    parser.add_argument(
        "--write", action="store_true", help=f"write {TABLE.name}, where other weights stay"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, choices=[ROUNDS])
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--shape", help="only this weight, as 4096x4096")
    options = parser.parse_args(arguments)
    return []


if __name__ == "__main__":
    main()
