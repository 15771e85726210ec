"""End to end: tokens a second of a language model of 100 million parameters, dense and sparse.

    python -m tests.benchmarks.bench_generate --write

The model of `examples/prune_language_model.py`, wider and deeper, with random weights, takes one
token a call under `torch.compile`. All forms take turns of sixteen tokens each, as a decoder runs
again and again through the same weights; medians. The cache of keys and values is left out: what is
measured are passes through all weights.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import fx_sparsity as fxs
from fx_sparsity.lowering.timing import machine

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from prune_language_model import LanguageModel

torch._dynamo.config.recompile_limit = 64  # the models share their code
TABLE = Path(__file__).with_name("generate.txt")
TURN = 16
TOKEN = torch.tensor([[65]])


@dataclass(frozen=True)
class Form:
    """A model to time.

    Attributes:
        make: from a dense float32 model, which it may change.
        level: of unstructured sparsity.
        freezing: whether Inductor packs the weights for its own kernels.
    """

    make: Callable[[nn.Module], nn.Module]
    level: float = 0.0
    freezing: bool = False


def bfloat(model: nn.Module) -> nn.Module:
    return model.bfloat16()


def int8(config: object, dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        model = model.to(dtype)
        quantize_(model, config)
        return model

    return make


DYNAMIC = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
WEIGHT_ONLY = Int8WeightOnlyConfig(set_inductor_config=False)
FORMS = {
    "dense bf16, frozen": Form(bfloat, freezing=True),
    "dense bf16": Form(bfloat),
    "dense int8 weight-only, frozen": Form(int8(WEIGHT_ONLY, torch.bfloat16), freezing=True),
    "dense int8 weight-only": Form(int8(WEIGHT_ONLY, torch.bfloat16)),
    "dense int8 dynamic, frozen": Form(int8(DYNAMIC, torch.bfloat16), freezing=True),
    "dense int8 dynamic": Form(int8(DYNAMIC, torch.bfloat16)),
    "sparse int8 50% dynamic": Form(int8(DYNAMIC, torch.bfloat16), 0.5),
    "sparse int8 50% weight-only": Form(int8(WEIGHT_ONLY, torch.bfloat16), 0.5),
    "sparse bf16 70%": Form(bfloat, 0.7),
    "sparse bf16 50%": Form(bfloat, 0.5),
}
TARGETS = (
    ("sparse int8 50%", "dense int8", 1.5),
    ("sparse int8 50%", "dense bf16", 3.0),
    ("sparse bf16 70%", "dense bf16", 1.8),
)


def make(form: Form, dim: int, layers: int) -> tuple[nn.Module, int]:
    """A model, lowered if it is sparse, and the bytes of its linear weights."""
    torch.manual_seed(0)
    model = LanguageModel(dim, layers, heads=dim // 64).eval()
    if form.level:
        sparsifier = fxs.WeightNormSparsifier()
        mapping = fxs.SparsityMapping().set_object_type(nn.Linear, f"unstructured {form.level:.0%}")
        fxs.prepare(model, sparsifier, (TOKEN,), mapping)
        sparsifier.step()
        model, _ = fxs.squash(model, sparsifier)
    model = form.make(model)
    rules = {nn.Linear: "always" if form.level else None}
    model, report = fxs.lower(model, (TOKEN,), rules)
    linear = [row for row in report.rows if row.fqn != "embed.weight"]
    return model, sum(row.bytes_after for row in linear)


def compiled(model: nn.Module, freezing: bool) -> Callable[[Tensor], Tensor]:
    # Not as an option of torch.compile, which would not pack bf16 weights for oneDNN (torch 2.13).
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        step = torch.compile(model, fullgraph=True)
        step(TOKEN)
    return step


@torch.no_grad()
def seconds(steps: dict[str, Callable[[Tensor], Tensor]], rounds: int) -> dict[str, float]:
    """A token; medians of all forms, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(TURN):
                step(TOKEN)
            if i:
                taken[name].append((time.perf_counter() - start) / TURN)
    return {name: statistics.median(times) for name, times in taken.items()}


def table(dim: int, layers: int, rounds: int, names: list[str]) -> str:
    steps, sizes = {}, {}
    for name in names:
        model, sizes[name] = make(FORMS[name], dim, layers)
        steps[name] = compiled(model, FORMS[name].freezing)
    count = sum(p.numel() for p in LanguageModel(dim, layers, dim // 64).parameters())
    return report(count, seconds(steps, rounds), sizes, rounds)


def report(count: int, taken: dict[str, float], sizes: dict[str, int], rounds: int) -> str:
    names = list(taken)
    lines = [
        f"{machine()}, {os.cpu_count()} processors, {platform.system()}",
        f"{count / 1e6:.0f} million parameters, one token a call, {rounds} rounds, medians",
        "",
        f"{'':<32}{'tokens/s':>10}{'MiB of linear weights':>24}",
    ]
    for name in names:
        lines.append(f"{name:<32}{1 / taken[name]:>10.1f}{sizes[name] / 2**20:>24.1f}")
    lines.append("")
    for sparse, dense, target in TARGETS:
        best = {
            kind: min((n for n in names if n.startswith(kind)), key=taken.__getitem__, default="")
            for kind in (sparse, dense)
        }
        if all(best.values()):
            ratio = taken[best[dense]] / taken[best[sparse]]
            verdict = "met" if ratio >= target else "missed"
            lines.append(f"{best[sparse]} over {best[dense]}: {ratio:.2f}x ({target}x {verdict})")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--write", action="store_true", help=f"into {TABLE.name}")
    options = parser.parse_args()
    text = table(options.dim, options.layers, options.rounds, options.forms)
    print(text)
    if options.write:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
