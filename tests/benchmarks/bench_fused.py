"""A static int8 layer of a pt2e graph in Inductor: fused, or lowered with the rest fused.

    python -m tests.benchmarks.bench_fused --write

A graph that is compiled with freezing multiplies codes by codes with oneDNN, and fuses what follows
the layer into the product. A lowered layer takes what the codes of its activations stand for, and
what follows is a kernel of Inductor's own. Both are compiled and frozen, and take turns. Speeds are
medians of 17 paired rounds, dense over lowered, with bounds of 97.5% each. `auto` says what
`lower(policy="auto")` chooses for that number of tokens.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import _inductor as inductor
from torch._dynamo.utils import counters
from torch.nn import functional

import fx_sparsity as fxs
from fx_sparsity.lowering import timing
from fx_sparsity.quantization.pt2e import default_quantizer
from tests.benchmarks.bench_auto import ROUNDS, Speed
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("fused.txt")
OUTPUTS, INPUTS = 1024, 4096
TOKENS = (1, 16, 64)
FOLLOWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing": lambda y, other: y,
    "relu": lambda y, other: functional.relu(y),
    "gelu": lambda y, other: functional.gelu(y),
    "add": lambda y, other: y + other,
}
ZEROS = {"unstructured 50%": "bitmask", "2:4": "nm", "block:32x32 90%": "block"}
_CALLS = 20
"""In a round."""


class Layer(nn.Module):
    """A linear layer, and what follows."""

    def __init__(self, follows: str) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, OUTPUTS)
        self.follows = FOLLOWS[follows]

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.follows(self.linear(x), other)


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True)


@torch.no_grad()
@inductor.config.patch(freezing=True)  # as an option of torch.compile, it comes too late for Dynamo
def rows(tokens: int, follows: str) -> list[str]:
    inputs = (torch.randn(tokens, INPUTS), torch.randn(tokens, OUTPUTS))
    found = []
    for zeros, packing in ZEROS.items():
        torch.manual_seed(0)
        quantized, proof = fxs.sparsify_and_quantize(
            Layer(follows).eval(),
            fxs.WeightNormSparsifier(),
            inputs,
            order="sparsify_first",
            backend="pt2e",
            mapping=zeros,
            config=default_quantizer(dynamic=False),
        )
        proof.raise_if_lost()
        _, report = fxs.lower(copy.deepcopy(quantized), inputs, "auto", tokens=(tokens,))
        lowered, _ = fxs.lower(copy.deepcopy(quantized), inputs, {"linear": packing})
        counters.clear()
        runs = []
        for model in (quantized, lowered):
            run = compiled(model)
            torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-2, atol=1e-2)
            runs.append(run)
        fused = counters["inductor"]["qlinear_weight_prepack_matcher_count"]
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for run, taken in zip(runs, times, strict=True):
                start = time.perf_counter()
                for _ in range(_CALLS):
                    run(*inputs)
                taken.append((time.perf_counter() - start) / _CALLS)
        dense, own = (1e3 * statistics.median(taken) for taken in times)
        chosen = report["linear.weight"].kernel or "dense"
        found.append(
            f"{tokens:<8}{follows:<9}{zeros:<18}{fused:<10}{dense:<10.3f}{own:<10.3f}"
            f"{Speed.of(*times)!s:<20}{chosen}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"to {TABLE.name}, too")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--follows", nargs="*", default=list(FOLLOWS), choices=FOLLOWS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [machine(), f"{OUTPUTS}x{INPUTS}, int8 with static activations", ""]
    head = ("tokens", 8), ("follows", 9), ("zeros", 18), ("qlinears", 10), ("dense", 10)
    lines.append(
        "".join(f"{name:<{width}}" for name, width in head) + "lowered   speed               auto"
    )
    print("\n".join(lines))
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(timing, "folders", lambda: [Path(folder)]),
    ):
        for tokens in given.tokens:
            for follows in given.follows:
                for line in rows(tokens, follows):
                    print(line, flush=True)
                    lines.append(line)
    if given.write:
        TABLE.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
