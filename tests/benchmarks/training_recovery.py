"""SmolLM2 after the best one-shot pruning, recovered by distillation, beside controls."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fx_sparsity as fxs
from fx_sparsity.pruning import Reconstruction
from fx_sparsity.pruning.methods import ALPS
from fx_sparsity.pruning.reconstruction import warm_cosine
from fx_sparsity.training import LowRank, Recovery, recover
from tests.benchmarks.bench_accuracy import (
    EVALUATED,
    LENGTH,
    REBUILT,
    Losses,
    Options,
    calibration,
    gap_share,
    language_model,
    losses,
)
from tests.benchmarks.corpora import Domain, digest, domains, sequences

STEPS = 560
"""Of two sequences: 30 minutes of two cores."""
RATES = {"kept": 1e-4, "vectors": 2e-3, "LoRA": 1e-3}
TRAIN: dict[str, Any] = {"kept": "kept", "vectors": "vectors", "LoRA": LowRank(32)}
BARS = {"calibrated": 0.7, "other": 0.85}
MOST = 500  # sequences of each domain


class Pruned:
    """The dense model, its best one-shot pruning, which is kept in a file, and the text.

    Args:
        options: where things lie.
        pattern: such as "2:4".
        rebuilt: how blocks are rebuilt after ALPS; None leaves that out.
    """

    def __init__(self, options: Options, pattern: str, rebuilt: Reconstruction | None) -> None:
        self.texts = domains()
        self.options = Options(options.name, options.state / digest(self.texts), options.smollm2)
        self.pattern, self.rebuilt = pattern, rebuilt
        short = pattern.rpartition(" ")[2]
        kind = "ALPS" if rebuilt is None else f"rebuilt {rebuilt.steps}"
        self.name = f"smollm2 {short} {kind}"
        self.file = self.options.state / f"{self.name}.pt"
        self.record_file = self.options.state / f"{self.name} record.safetensors"

    def dense(self) -> tuple[nn.Module, Callable[[str], list[int]]]:
        return language_model(self.options.smollm2)

    def held_out(self, encode: Callable[[str], list[int]]) -> dict[str, list[Tensor]]:
        return {d.name: sequences(d.evaluation, encode, LENGTH, EVALUATED) for d in self.texts}

    def make(self) -> dict[str, Any]:
        """Prune, once; gives the losses."""

        def work() -> dict[str, Any]:
            model, encode = self.dense()
            mapping = fxs.SparsityMapping().set_global(self.pattern)
            mapping.set_module_name("lm_head", None).set_module_name("model.embed_tokens", None)
            sparsifier, start = ALPS(), time.perf_counter()
            batches = calibration(self.texts, encode)
            fxs.prune(model, sparsifier, batches, mapping, reconstruction=self.rebuilt)
            model, record = fxs.squash(model, sparsifier)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), self.file)
            record.save(self.record_file)
            seconds = time.perf_counter() - start
            return {"losses": losses(model, self.held_out(encode)), "seconds": seconds}

        found: dict[str, Any] = Options(self.name, self.options.state, None).once("pruned", work)
        return found

    def load(self) -> tuple[nn.Module, fxs.SparsityRecord, Callable[[str], list[int]]]:
        model, encode = self.dense()
        model.load_state_dict(torch.load(self.file, weights_only=True))
        return model, fxs.SparsityRecord.load(self.record_file), encode

    def text(self, encode: Callable[[str], list[int]], most: int) -> list[dict[str, Tensor]]:
        return training_text(self.texts, encode, most)


def training_text(
    texts: list[Domain], encode: Callable[[str], list[int]], most: int
) -> list[dict[str, Tensor]]:
    """Batches of one sequence, the domains in turn, as far as the shortest goes."""
    found = [sequences(d.calibration, encode, LENGTH, most) for d in texts if d.calibration]
    return [{"input_ids": x} for turn in zip(*found, strict=False) for x in turn]


def recovered(pruned: Pruned, kind: str, steps: int) -> dict[str, Any]:
    """Losses after so many steps of one kind; a run that was stopped goes on."""
    model, record, encode = pruned.load()
    teacher, _ = pruned.dense()
    file = pruned.options.state / f"{pruned.name} {kind} {steps}.run"
    options = Recovery(
        steps=steps,
        learning_rate=RATES[kind],
        autocast=torch.bfloat16,
        held_out=0.02,
    )
    busy = time.process_time()
    model, report = recover(
        model,
        teacher,
        pruned.text(encode, MOST),
        record,
        options,
        train=TRAIN[kind],
        checkpoint=file,
        save_every=20,
    )
    fxs.verify(model, record).raise_if_lost()
    found = {
        "losses": losses(model, pruned.held_out(encode)),
        "seconds": report.seconds,
        "busy": time.process_time() - busy,
        "curve": [row.loss for row in report.rows],
        "trained": report.trained,
        "memory": dict(report.memory),
    }
    file.unlink()
    return found


def trained_densely(pruned: Pruned, steps: int) -> dict[str, Any]:
    """The control: the dense model, as many steps on the next token of the same text."""
    model, encode = pruned.dense()
    batches = pruned.text(encode, MOST)
    kept = [p for n, p in model.named_parameters() if "layers" in n or p.ndim < 2]
    optimizer = torch.optim.AdamW(kept, RATES["kept"], betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    start = time.perf_counter()
    for step in range(steps):
        for place in (2 * step, 2 * step + 1):
            x = batches[place % len(batches)]["input_ids"]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x, use_cache=False).logits[0, :-1]
            (cross_entropy(logits.float(), x[0, 1:]) / 2).backward()
        nn.utils.clip_grad_norm_(kept, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - start
    return {"losses": losses(model, pruned.held_out(encode)), "seconds": seconds}


def measure_recovery(
    options: Options, pattern: str, kind: str, steps: int, rebuilt: Reconstruction | None = REBUILT
) -> tuple[list[str], list[str]]:
    """What is left of the best one-shot's gap; and what four times the steps would leave."""
    pruned = Pruned(options, pattern, rebuilt)

    def dense_losses() -> Losses:
        model, encode = pruned.dense()
        return losses(model, pruned.held_out(encode))

    common = Options("smollm2", pruned.options.state, None)
    dense = common.once("dense", dense_losses)
    before = pruned.make()
    once = Options(pruned.name, pruned.options.state, None).once
    if kind == "dense":
        after = common.once(f"trained {steps}", lambda: trained_densely(pruned, steps))
        quarter = None
    else:
        after = once(f"{kind} {steps}", lambda: recovered(pruned, kind, steps))
        fewer = max(steps // 4, 1)
        quarter = once(f"{kind} {fewer}", lambda: recovered(pruned, kind, fewer))
    return told(options.name, pruned.texts, dense, before, after, quarter, kind)


def told(
    name: str,
    texts: list[Domain],
    dense: Losses,
    before: dict[str, Any],
    after: dict[str, Any],
    quarter: dict[str, Any] | None,
    kind: str,
) -> tuple[list[str], list[str]]:
    """Lines and missed bars; only all kept weights have bars."""
    what = "trained dense" if kind == "dense" else f"recovered, {kind}"
    lines = [
        f"{name}: {what}, {after['seconds']:.0f} s",
        f"{'domain':<12}{'dense':>8}{'one-shot':>10}{'after':>8}{'share of the gap':>20}"
        f"{'bar':>7}{'4 x as long (extrapolated)':>28}",
    ]
    missed = []
    for domain in texts:
        bar = BARS["calibrated" if domain.calibration else "other"]
        values = [dense[domain.name], before["losses"][domain.name], after["losses"][domain.name]]
        share, low, high = gap_share(*values)
        nats = [sum(v) / len(v) for v in values]
        later = ""
        if quarter is not None:
            early = quarter["losses"][domain.name]
            gap = nats[2] - nats[0]
            first = sum(early) / len(early) - nats[0]
            later = f"{extrapolated(first, gap) / (nats[1] - nats[0]):.2f}"
        lines.append(
            f"{domain.name:<12}"
            + "".join(f"{math.exp(n):>{w}.2f}" for n, w in zip(nats, (8, 10, 8), strict=True))
            + f"{share:>8.2f} ({low:.2f}-{high:.2f}){bar:>7.2f}{later:>28}"
        )
        if kind == "kept" and share > bar:
            missed.append(f"{name}, {domain.name}: {share:.2f} of the gap is left, bar {bar}")
    if "memory" in after:
        sizes = ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in after["memory"].items())
        lines.append(f"{after['trained']:,} values trained; {sizes}")
    return lines, missed


def extrapolated(quarter: float, whole: float) -> float:
    """The gap after four times as many steps, if it goes on falling by the same factor."""
    return whole if quarter <= 0 or whole <= 0 else whole * min(1.0, whole / quarter)
