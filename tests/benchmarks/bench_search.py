"""Whether a plan is better than one level everywhere that takes as many bytes, on data held out.

    python -m tests.benchmarks.bench_search --check

Two models are pruned by Wanda: all-MiniLM-L6-v2, whose linear layers are calibrated on every other
sentence of `examples/calibration.txt`, searched with the rest and judged by the cosines with its
dense embeddings of the sentences of `examples/sparsify_minilm.py`; and a small language model,
trained as `examples/prune_language_model.py` does, judged by its perplexity a byte on files that it
never saw. One level everywhere gets at least the bytes of the plan.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fx_sparsity as fxs
from examples.prune_language_model import LanguageModel, load_text, sample, train
from fx_sparsity.pruning import Budget, Evaluation, cosine, perplexity, search, sensitivity
from fx_sparsity.pruning.allocation import divergence, squared_change
from fx_sparsity.reports import format_table

TABLE = Path(__file__).with_name("search.txt")
SHARES = (0.6, 0.5, 0.4)
"""Bytes of the plan, of those of the dense weights."""
MEASURED = 2
"""Batches of those of calibration that the effects of single weights are measured on, at most."""
BARS = {
    "all-MiniLM-L6-v2": "the plan's cosine is at least that of one level of as many bytes",
    "language model": "the plan's perplexity is at most that of one level of as many bytes",
}
CANDIDATES = (*(f"unstructured {percent}%" for percent in range(30, 100, 10)), "2:4", "4:8")


class Result(NamedTuple):
    """One plan, and one level everywhere of as many bytes.

    Attributes:
        seconds: of the search, the sensitivity apart.
    """

    model: str
    share: float
    higher: bool
    dense: float
    plan: float
    level: float
    uniform: float
    evaluations: int
    seconds: float
    measured: float

    @property
    def met(self) -> bool:
        return self.plan >= self.uniform if self.higher else self.plan <= self.uniform


class Subject(NamedTuple):
    """A model, what it is calibrated on, and two evaluations: of the search, and of the end."""

    name: str
    model: nn.Module
    batches: list
    change: Callable
    searched: Evaluation
    held_out: Evaluation
    takes: Callable


def minilm() -> Subject:
    """The sentence encoder."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from prune_minilm import calibration_batches
    from sparsify_minilm import load_encoder

    encoder, held_out = load_encoder()
    batches = calibration_batches()
    return Subject(
        "all-MiniLM-L6-v2",
        encoder,
        batches[::2],
        squared_change,
        cosine(encoder, batches[1::2]),
        cosine(encoder, [held_out]),
        lambda site: site.kind == "linear",
    )


def language_model(steps: int, seed: int) -> Subject:
    """A small language model of bytes."""
    text, held_out = load_text()
    torch.manual_seed(seed)
    model = LanguageModel()
    for _ in train(model, text, steps):
        pass
    model.eval().requires_grad_(False)
    drawn = sample(text, 192, torch.Generator().manual_seed(2))
    judging = sample(held_out, 256, torch.Generator().manual_seed(1))
    batches = list(drawn[:64, :-1].split(32))
    return Subject(
        "language model",
        model,
        batches,
        divergence,
        perplexity(drawn[64:, :-1].split(32)),
        perplexity(judging[:, :-1].split(32)),
        lambda site: "blocks" in site.fqn,
    )


@torch.no_grad()
def measure(subject: Subject) -> Iterator[Result]:
    """Search at some bytes, and compare."""
    name, model, batches, change, searched, held_out, takes = subject
    report = sensitivity(
        *(model, fxs.WandaSparsifier(), batches[:: -(-len(batches) // MEASURED)]),
        candidates=lambda site: CANDIDATES if takes(site) else (),
        change=change,
        progress=False,
    )
    elements, dense = (
        sum(row.elements for row in report.rows),
        sum(row.bytes for row in report.rows),
    )

    def judged(mapping) -> float:
        sparsifier = fxs.WandaSparsifier()
        found, _ = fxs.prune(copy.deepcopy(model), sparsifier, batches, mapping, progress=False)
        return held_out(found)

    for share in SHARES:
        start = time.perf_counter()
        plan = search(
            *(model, fxs.WandaSparsifier(), batches, searched),
            Budget(bytes=report.other_bytes + share * dense),
            sensitivity=report,
            progress=False,
        )
        seconds = time.perf_counter() - start
        nbytes = plan.point.bytes - report.other_bytes
        level = math.floor(1000 * (1 - (nbytes - elements / 8) / (4 * elements))) / 1000
        even = fxs.SparsityMapping()
        for fqn in report:
            even.set_module_name(fqn, fxs.SparsityConfig("unstructured", level))
        yield Result(
            *(name, share, searched.better == "higher", held_out(model)),
            *(judged(plan.mapping), level, judged(even)),
            *(plan.evaluations, seconds, report.seconds),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_search")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--list", action="store_true", help="name the bars, and do not run")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--row", choices=BARS, action="append", help="one model alone")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of its training")
    options = parser.parse_args(arguments)
    if options.list:
        print(*BARS.values(), sep="\n")
        return 0
    subjects = {
        "all-MiniLM-L6-v2": minilm,
        "language model": lambda: language_model(options.steps, options.seed),
    }
    results = [r for name in options.row or BARS for r in measure(subjects[name]())]
    rows = [
        (
            *(r.model, f"{r.share:.0%}", f"{r.dense:.4f}", f"{r.plan:.4f}", f"{r.uniform:.4f}"),
            *(f"{r.level:.1%}", r.evaluations, f"{r.measured:.0f}", f"{r.seconds:.0f}"),
        )
        for r in results
    ]
    header = ("model", "bytes", "dense", "plan", "one level", "which", "evaluations")
    table = format_table((*header, "s to measure", "s to search"), rows)
    lines = [
        f"{r.model} at {r.share:.0%}: {BARS[r.model]}; {'met' if r.met else 'MISSED'}"
        for r in results
    ]
    printed = "\n".join([table, "", *lines])
    print(printed)
    if options.write:
        TABLE.write_text(printed + "\n")
    return int(options.check and not all(r.met for r in results))


if __name__ == "__main__":
    sys.exit(main())
