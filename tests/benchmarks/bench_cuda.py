"""2:4 on CUDA next to dense, through the packing "semi_structured"; needs a GPU.

    python -m tests.benchmarks.bench_cuda --write

Dense and packed take turns; medians of 15 rounds, each of as many calls as take about 10 ms. Dense
int8 is `torch._int_mm`, of 32 tokens or more, as it wants them, and dense float8 `torch._scaled_mm`,
both of codes that are ready, while ours quantizes the activations. What torch refuses is printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from fx_sparsity.kernels import PackingError, SparseLinear
from fx_sparsity.kernels.activations import quantize
from tests.benchmarks.bench_linear import two_of_four

TABLE = Path(__file__).with_name("cuda.txt")
SHAPES = [(4096, 4096), (4096, 11008)]
TOKENS = (1, 16, 64, 256, 1024, 4096)
ROUNDS, ROUND = 15, 10e-3
HEADER = f"{'weight':<12}{'dtype':<14}{'M':<6}{'ours us':>10}{'dense us':>10}{'times':>7}"

Run = Callable[[Tensor], Tensor]


def seconds(run: Run, x: Tensor, calls: int) -> float:
    """A call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run(x)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def forms(weight: Tensor, dtype: torch.dtype) -> tuple[Run, Run]:
    """Ours and dense."""
    if dtype == torch.float8_e4m3fn:
        return float8_forms(weight)
    if dtype != torch.int8:
        weight = weight.to(dtype)
        ours = SparseLinear.from_dense(weight, packing="semi_structured")
        return ours, lambda x: linear(x, weight)
    codes = (weight * 16).round().clamp(-127, 127).to(torch.int8)
    ours = SparseLinear.from_dense(
        codes,
        packing="semi_structured",
        scale=torch.full((len(codes),), 1 / 16, device=codes.device),
        quantize_input="token_symmetric",
    )
    ready = {n: torch.ones(max(n, 32), codes.shape[1], dtype=torch.int8).cuda() for n in TOKENS}
    return ours, lambda x: torch._int_mm(ready[len(x)], codes.t())


def float8_forms(weight: Tensor) -> tuple[Run, Run]:
    """Ours and dense, of float8 codes with a scale a row."""
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale.unsqueeze(1)).to(torch.float8_e4m3fn)
    ours = SparseLinear.from_dense(
        codes, packing="semi_structured", scale=scale, quantize_input="token_float8"
    )
    ready = {n: quantize(torch.randn(n, codes.shape[1]).cuda(), "token_float8") for n in TOKENS}

    def dense(x: Tensor) -> Tensor:
        rows, x_scale, _ = ready[len(x)]
        scales = {"scale_a": x_scale, "scale_b": scale.unsqueeze(0)}
        return torch._scaled_mm(
            rows, codes.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return ours, dense


@torch.inference_mode()
def main() -> None:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_cuda")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    lines = [f"{torch.cuda.get_device_name()}; torch {torch.__version__}", "", HEADER]
    print("\n".join(lines))
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn):
            torch.manual_seed(0)
            try:
                runs = forms(two_of_four(torch.randn(shape), 0.5).cuda(), dtype)
            except PackingError as error:
                print(error)
                continue
            for tokens in TOKENS:
                floating = torch.bfloat16 if dtype.itemsize == 1 else dtype
                x = torch.randn(tokens, shape[1], dtype=floating, device="cuda")
                for run in runs:
                    seconds(run, x, 3)  # warms up
                counts = [max(1, round(ROUND / seconds(run, x, 3))) for run in runs]
                taken: tuple[list[float], list[float]] = [], []
                for _ in range(ROUNDS):
                    for run, count, times in zip(runs, counts, taken, strict=True):
                        times.append(1e6 * seconds(run, x, count))
                ours, dense = map(statistics.median, taken)
                lines.append(
                    f"{'x'.join(map(str, shape)):<12}{str(dtype)[6:]:<14}{tokens:<6}"
                    f"{ours:>10.1f}{dense:>10.1f}{dense / ours:>7.2f}"
                )
                print(lines[-1], flush=True)
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
