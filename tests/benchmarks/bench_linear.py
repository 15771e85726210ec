"""Linear layers with packed weights next to torch's best dense ones, of the same dtype.

    python -m tests.benchmarks.bench_linear --write
    python -m tests.benchmarks.bench_linear --write --table linear_vnni.txt  # without VBMI2 and BF16

All candidates of a weight take turns, each time with another copy of their weight, so that none
finds it in the cache; medians, in milliseconds. All are operators, without the modules around them.
The dense ones get every advantage: weights packed ahead, the best kernel for each number of tokens,
and, for int8, inputs that need no conversion.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fx_sparsity._native import KERNELS
from fx_sparsity.kernels import PACKINGS, SparseLinear
from fx_sparsity.kernels.ops import linear_operator
from tests.benchmarks.bench_masks import machine

TABLE = "linear.txt"
SHAPES = [(4096, 4096), (4096, 11008)]  # [out, in]
TOKENS = (1, 4, 16, 64)
HEADER = (
    f"{'weight':<12}{'dtype':<10}{'packing':<12}{'zeros':<7}{'M':<5}"
    f"{'ours':>8}{'torch':>8}{'times':>7}  {'by':<14}{'int4':>8}{'times':>7}{'target':>8}"
)

Run = Callable[[Tensor], Tensor]


def unstructured(weight: Tensor, sparsity: float) -> Tensor:
    """Zeros anywhere."""
    return weight * (torch.rand(weight.shape) >= sparsity)


def two_of_four(weight: Tensor, sparsity: float) -> Tensor:
    """2:4, which is half."""
    assert sparsity == 0.5
    groups = weight.unflatten(1, (-1, 4))
    smaller = groups.abs().topk(2, largest=False).indices
    return groups.scatter(-1, smaller, 0).flatten(1)


def blocks(height: int, width: int) -> Callable[[Tensor, float], Tensor]:
    """Whole blocks of zeros, at random."""

    def zeros(weight: Tensor, sparsity: float) -> Tensor:
        rows, columns = weight.shape
        kept = torch.rand(rows // height, columns // width) >= sparsity
        return weight * kept.repeat_interleave(height, 0).repeat_interleave(width, 1)

    return zeros


@dataclass(frozen=True)
class Entry:
    """A packing to measure: how weights get zeros that suit it, and how many."""

    name: str
    packing: str
    zeros: Callable[[Tensor, float], Tensor]
    sparsities: tuple[float, ...]


ENTRIES = [
    Entry("bitmask", "bitmask", unstructured, (0.5, 0.7, 0.9)),
    Entry("2:4", "nm", two_of_four, (0.5,)),
    Entry("16x4 block", "block", blocks(16, 4), (0.5, 0.9)),
    Entry("32x32 block", "block", blocks(32, 32), (0.5, 0.9)),
]

# (dtype, entry, sparsity, tokens) -> speed against torch's best of the dtype.
TARGETS = {
    ("bf16", "bitmask", 0.5, 1): 1.7,
    ("bf16", "bitmask", 0.7, 1): 2.7,
    ("bf16", "bitmask", 0.5, 4): 1.5,
    ("int8", "bitmask", 0.5, 1): 2.2,
    ("bf16", "2:4", 0.5, 1): 2.0,
    ("bf16", "2:4", 0.5, 4): 1.7,
    ("bf16", "2:4", 0.5, 16): 1.0,
    ("bf16", "16x4 block", 0.9, 1): 10.0,
    ("bf16", "32x32 block", 0.5, 1): 2.3,
    ("bf16", "32x32 block", 0.9, 1): 10.0,
    ("bf16", "32x32 block", 0.5, 16): 2.1,
    ("bf16", "32x32 block", 0.5, 64): 1.8,
    ("bf16", "32x32 block", 0.9, 64): 7.0,
}
# The same against torch's int4.
INT4_TARGETS = {("int8", "bitmask", 0.5, 1): 1.0, ("int8", "bitmask", 0.7, 1): 1.6}


@dataclass(frozen=True)
class Candidate:
    """Something to time: one callable a copy of its weight."""

    name: str
    runs: Sequence[Run]
    x_dtype: torch.dtype


# Torch's dense kernels, each from fp32 values of a weight, rounded as the kernel needs.


def eager(weight: Tensor) -> Run:
    return lambda x: linear(x, weight)


def packed(weight: Tensor) -> Run:
    """The operator that freezing puts in place of a linear layer."""
    ahead = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ahead, None, "none", [], "")


def codes(weight: Tensor) -> Tensor:
    """Symmetric int8 codes; their scale is the same for every output, 1 / 16."""
    return (weight * 16).round().clamp(-127, 127).to(torch.int8)


def dynamic(engine: str) -> Callable[[Tensor], Run]:
    def make(weight: Tensor) -> Run:
        scales = torch.full((len(weight),), 1 / 16, dtype=torch.double)
        zeros = torch.zeros(len(weight), dtype=torch.long)
        quantized = torch.quantize_per_channel(
            codes(weight).float() / 16, scales, zeros, 0, torch.qint8
        )
        torch.backends.quantized.engine = engine
        ahead = torch.ops.quantized.linear_prepack(quantized, None)

        def run(x: Tensor) -> Tensor:
            return torch.ops.quantized.linear_dynamic(x, ahead, True)

        return run

    return make


def static(weight: Tensor) -> Run:
    """Without the quantization of the activations."""
    scale, zero = torch.full((len(weight),), 1 / 16), torch.zeros(len(weight), dtype=torch.int32)
    ahead = torch.ops.onednn.qlinear_prepack(codes(weight).t(), None)

    def run(x: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            x, 0.1, 128, ahead, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    return run


def weight_only(weight: Tensor) -> Run:
    ahead, scales = codes(weight), torch.full((len(weight),), 1 / 16, dtype=torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(x, ahead, scales)


def int4(weight: Tensor) -> Run:
    """Groups of 128."""
    values = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    ahead = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2)
    scales = torch.rand(weight.shape[1] // 128, len(weight), 2).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, ahead, 128, scales)


BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8
DENSE: dict[str, list[tuple[str, Callable[[Tensor], Run], torch.dtype]]] = {
    "f32": [("eager", eager, F32), ("packed", packed, F32)],
    "bf16": [("eager", eager, BF16), ("packed", packed, BF16)],
    "int8": [
        ("dynamic x86", dynamic("x86"), F32),
        ("dynamic onednn", dynamic("onednn"), F32),
        ("static onednn", static, U8),
        ("weight only", weight_only, BF16),
    ],
    "int8-only": [("weight only", weight_only, BF16)],
}


def sparse(entry: Entry, sparsity: float, dtype: str, weight: Tensor, copies: int) -> Candidate:
    """Our operator, under the name of its entry."""
    weight = entry.zeros(weight, sparsity)
    options: dict[str, Any] = {}
    if dtype.startswith("int8"):
        weight = codes(weight)
        options["scale"] = torch.full((len(weight),), 1 / 16)
        options["quantize_input"] = "token_symmetric" if dtype == "int8" else "none"
    layer = SparseLinear.from_dense(
        weight.bfloat16() if dtype == "bf16" else weight, packing=entry.packing, **options
    )
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
    runs = [operator(layer) for layer in layers]
    return Candidate(f"{entry.name} {sparsity}", runs, F32 if dtype == "f32" else BF16)


def operator(layer: SparseLinear) -> Run:
    """What the layer calls."""
    run = linear_operator(PACKINGS[layer.packing])
    vectors = (layer.scale, layer.row_sums, layer.bias)
    shape = (layer.in_features, layer.out_features)
    operands = (*layer.parts().values(), *vectors, *shape, layer.quantize_input, layer.activation)
    return lambda x: run(x, *operands)


def dense(dtype: str, weight: Tensor, copies: int) -> Iterator[Candidate]:
    """Those kernels of torch that run here."""
    kernels = DENSE[dtype] if dtype == "f32" else [*DENSE[dtype], ("int4", int4, BF16)]
    for name, make, x_dtype in kernels:
        own = weight.bfloat16() if x_dtype == BF16 else weight
        try:
            runs = [make(own) for _ in range(copies)]
            runs[0](activations(1, weight.shape[1], x_dtype))
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        yield Candidate(name, runs, x_dtype)


def activations(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(tokens, columns)
    return (x * 16 + 128).clamp(0, 255).to(dtype) if dtype == U8 else x.to(dtype)


@torch.inference_mode()
def measure(
    candidates: Sequence[Candidate], columns: int, runs: int
) -> dict[int, dict[str, float]]:
    """Median milliseconds by tokens and name; candidates and copies take turns."""
    medians: dict[int, dict[str, float]] = {}
    for tokens in TOKENS:
        xs = {dtype: activations(tokens, columns, dtype) for dtype in (F32, BF16, U8)}
        times: dict[str, list[float]] = {c.name: [] for c in candidates}
        for run in range(-2, runs):
            for c in candidates:
                work, x = c.runs[run % len(c.runs)], xs[c.x_dtype]
                start = time.perf_counter()
                work(x)
                elapsed = time.perf_counter() - start
                if run >= 0:
                    times[c.name].append(1000 * elapsed)
        medians[tokens] = {name: statistics.median(values) for name, values in times.items()}
    return medians


def lines(
    shape: tuple[int, int], dtype: str, entries: Sequence[Entry], options: Any
) -> Iterator[str]:
    """The rows of one weight."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    ours = [
        (entry, sparsity, sparse(entry, sparsity, dtype, weight, options.copies))
        for entry in entries
        for sparsity in entry.sparsities
    ]
    torchs = list(dense(dtype, weight, options.copies))
    medians = measure([*(c for *_, c in ours), *torchs], shape[1], options.runs)
    for entry, sparsity, candidate in ours:
        for tokens, times in medians.items():
            own = times[candidate.name]
            best, by = min((times[c.name], c.name) for c in torchs if c.name != "int4")
            key = (dtype, entry.name, sparsity, tokens)
            against_int4 = times["int4"] / own if "int4" in times else None
            verdicts = [
                f"{target:.1f}{'' if reached >= target else ' MISSED'}"
                for targets, reached in ((TARGETS, best / own), (INT4_TARGETS, against_int4 or 0.0))
                if (target := targets.get(key))
            ]
            yield (
                f"{'x'.join(map(str, shape)):<12}{dtype:<10}{entry.name:<12}{sparsity:<7.0%}"
                f"{tokens:<5}{own:>8.3f}{best:>8.3f}{best / own:>7.2f}  {by:<15}"
                + (f"{times['int4']:>8.3f}{against_int4:>7.2f}" if against_int4 else " " * 15)
                + "  "
                + ", ".join(verdicts)
            ).rstrip()


def main(arguments: list[str] | None = None) -> list[str]:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_linear")
    parser.add_argument(
        "--write", action="store_true", help="write the table, where other weights stay"
    )
    parser.add_argument("--table", default=TABLE, help="its name, one for each kind of processor")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--copies", type=int, default=2, help="of each weight")
    parser.add_argument("--packing", default="", help="only those whose name contains this")
    parser.add_argument("--dtype", choices=DENSE, help="only this one")
    parser.add_argument("--shape", help="only this weight, as 4096x4096")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    shapes = SHAPES
    if options.shape:
        rows, columns = options.shape.split("x")
        shapes = [(int(rows), int(columns))]
    table = []
    head = [machine(KERNELS), f"median of {options.runs} runs", "", HEADER]
    print("\n".join(head), flush=True)
    for shape in shapes:
        for dtype in [options.dtype] if options.dtype else DENSE:
            chosen = [entry for entry in ENTRIES if options.packing in entry.name]
            for line in lines(shape, dtype, chosen, options):
                table.append(line)
                print(line, flush=True)
    if options.write:
        measured = {tuple(line.split()[:2]) for line in table}
        path = Path(__file__).with_name(options.table)
        before = path.read_text().splitlines()[len(head) :] if path.exists() else []
        kept = [line for line in before if tuple(line.split()[:2]) not in measured]
        path.write_text("\n".join([*head, *kept, *table]) + "\n")
    return table


if __name__ == "__main__":
    main()
