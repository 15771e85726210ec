"""Lookups in row-pruned tables, next to torch's in the dense table and in its own pruned one.

    python -m tests.benchmarks.bench_embedding --write

A table of 1,000,000 x 64 fp32, half its rows pruned. Candidates take turns on the same indices,
which are new in every run, so that rows come from as far as the distribution allows; medians.
Ratios are over torch's dense fp32 lookup.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fx_sparsity._native import KERNELS
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.reports import format_table
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("embedding.txt")
KEPT = 0.5
BAGS = [(512, 20), (64, 20), (2048, 80)]
HEADER = ("lookup", "indices", "table", "MiB", "of fp32", "ms", "speed", "speed, at least 95%")

Lookup = Callable[[Tensor], Tensor]


def uniform(rows: int, shape: tuple[int, int]) -> Tensor:
    """Every row alike."""
    return torch.randint(rows, shape)


def zipf(rows: int, shape: tuple[int, int]) -> Tensor:
    """The row of rank r with a probability close to 1 / r; popular rows lie anywhere."""
    rank = torch.exp(torch.rand(shape) * torch.log(torch.tensor(float(rows)))).long() - 1
    return rank.clamp(0, rows - 1) * 7919 % rows


DISTRIBUTIONS = {"uniform": uniform, "zipf": zipf}


def pruned_table(rows: int) -> Tensor:
    """A weight of which half the rows are zero."""
    weight = torch.randn(rows, 64)
    weight[torch.rand(rows) >= KEPT] = 0
    return weight


def torch_pruned(weight: Tensor) -> tuple[int, Lookup]:
    """Torch's 8-bit rows with a remap, and their bytes."""
    kept = (weight != 0).any(1)
    remap = torch.where(kept, kept.cumsum(0) - 1, -1).int()
    packed = torch.ops.quantized.embedding_bag_byte_prepack(weight[kept])
    operator = torch.ops.quantized.embedding_bag_byte_rowwise_offsets

    def look_up(indices: Tensor) -> Tensor:
        offsets = torch.arange(0, indices.numel(), indices.shape[1])
        return operator(
            packed,
            indices.flatten(),
            offsets,
            pruned_weights=True,
            compressed_indices_mapping=remap,
        )

    return packed.nbytes + remap.nbytes, look_up


def bags(weight: Tensor) -> dict[str, tuple[int, Lookup]]:
    """Sums of bags: name -> bytes, and what looks up [bags, size]."""
    dense = nn.EmbeddingBag.from_pretrained(weight, mode="sum")
    found: dict[str, tuple[int, Lookup]] = {
        "torch fp32, dense": (weight.nbytes, dense),
        "torch int8, pruned": torch_pruned(weight),
    }
    for name, bits in (("fp32", None), ("int8", 8), ("int4", 4)):
        module = RowPrunedEmbeddingBag.from_dense(weight, bits=bits, mode="sum")
        found[f"{name}, pruned"] = (module.nbytes, module)
    module = RowPrunedEmbeddingBag.from_dense(weight.bfloat16(), mode="sum")
    found["bf16, pruned"] = (module.nbytes, module)
    return found


def lookups(weight: Tensor) -> dict[str, tuple[int, Lookup]]:
    """Single rows: name -> bytes, and what looks up indices of any shape."""
    dense = nn.Embedding.from_pretrained(weight)
    found: dict[str, tuple[int, Lookup]] = {"torch fp32, dense": (weight.nbytes, dense)}
    for name, bits in (("fp32", None), ("int8", 8), ("int4", 4)):
        module = RowPrunedEmbedding.from_dense(weight, bits=bits)
        found[f"{name}, pruned"] = (module.nbytes, module)
    return found


@torch.inference_mode()
def measure(
    candidates: dict[str, tuple[int, Lookup]], batches: list[Tensor]
) -> Iterator[tuple[str, int, float, float, float]]:
    """Name, bytes, milliseconds; speed over the first candidate in the median and in 95% of runs."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run, indices in enumerate(batches):
        # Whoever comes first finds what the others left in cache, so they take turns at that.
        names = list(candidates)
        shift = run % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            candidates[name][1](indices)
            times[name].append(1000 * (time.perf_counter() - start))
    dense = next(iter(times.values()))
    for name, (size, _) in candidates.items():
        ratios = sorted(x / y for x, y in zip(dense, times[name], strict=True))
        yield (
            name,
            size,
            statistics.median(times[name]),
            statistics.median(dense) / statistics.median(times[name]),
            ratios[len(ratios) // 20],
        )


def main(arguments: list[str] | None = None) -> list[tuple[object, ...]]:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_embedding")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=300)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    head = machine(KERNELS)
    weight = pruned_table(options.rows)
    kinds = {"bags": (bags(weight), BAGS), "rows": (lookups(weight), [(512, 20)])}
    found: list[tuple[object, ...]] = []
    for kind, (candidates, shapes) in kinds.items():
        for shape in shapes:
            for distribution, draw in DISTRIBUTIONS.items():
                batches = [draw(options.rows, shape) for _ in range(options.runs)]
                for name, size, *figures in measure(candidates, batches):
                    share = size / weight.nbytes
                    where = (f"{kind}, {distribution}", "x".join(map(str, shape)))
                    found.append((*where, name, size / 2**20, share, *figures))
    text = "\n".join([head, f"median of {options.runs} runs", "", format_table(HEADER, found)])
    print(text)
    if options.write:
        TABLE.write_text(text + "\n")
    return found


if __name__ == "__main__":
    main()
