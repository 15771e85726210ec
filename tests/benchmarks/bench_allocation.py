"""Whether allocations help, and whether statistics block by block are those of the reference codes.

    python -m tests.benchmarks.bench_allocation --check

A small language model is trained as `examples/prune_language_model.py` does, pruned by Wanda from
the same batches, and judged by its perplexity a byte on files that it never saw. OWL's rule (arXiv
2310.05175, section 3.2) and the flow of the codes of Wanda and SparseGPT, in which a block runs
dense, is pruned whole, and runs again, are written down plainly here, with hooks and sorting.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fx_sparsity as fxs
from examples.prune_language_model import (
    LanguageModel,
    judge,
    load_text,
    perplexity,
    sample,
    train,
)
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.pruning.allocation import OWL, LeastError, Uniform
from fx_sparsity.reports import format_table

TABLE = Path(__file__).with_name("allocation.txt")
LEVELS = (0.6, 0.7)
BARS = {
    "OWL": "OWL is at most 0.5% above its rule written plainly",
    "LeastError": "LeastError is never behind one level everywhere",
    "blocks": "statistics block by block are those of the reference flow, within two standard errors",
}
RULES = {
    "uniform": Uniform,
    "OWL": OWL,
    "LeastError": LeastError,
}


def mean_squares(block: nn.Module, linears: Mapping[str, nn.Linear], run) -> dict[str, Tensor]:
    """Name -> mean square of each input of a linear layer, while `run` runs the block."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0]))
        for name, linear in linears.items()
    ]
    run(block)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).flatten(0, -2).square().mean(0) for name, found in seen.items()}


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def scores_of(block: nn.Module, states: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name -> Wanda's scores of a linear layer."""
    linears = linears_of(block)
    squares = mean_squares(block, linears, lambda block: [block(x) for x in states])
    return {name: linear.weight.abs() * squares[name].sqrt() for name, linear in linears.items()}


@torch.no_grad()
def reference_levels(
    model: LanguageModel, batches: Sequence[Tensor], level: float, spread=0.08, multiple=5
) -> list[float]:
    """The level of each block by OWL's rule, which goes by the dense model."""
    states, ratios = [model.embed(batch) for batch in batches], []
    for block in model.blocks:
        pool = torch.cat([scores.flatten() for scores in scores_of(block, states).values()])
        ratios.append((pool > multiple * pool.mean()).float().mean() * 100)
        states = [block(x) for x in states]
    ratio = torch.stack(ratios)
    density = (ratio - ratio.min()) / (ratio.max() - ratio.min()) * 2 * spread
    return (1 - (density - density.mean() + 1 - level)).tolist()


@torch.no_grad()
def reference_flow(
    model: LanguageModel, batches: Sequence[Tensor], levels: Sequence[float]
) -> LanguageModel:
    """A copy pruned block by block: all statistics of a block come before its first mask.

    Within rows, as Wanda goes; where what is to go is no multiple of the rows, the first lose one
    more.
    """
    model = copy.deepcopy(model)
    states = [model.embed(batch) for batch in batches]
    for block, level in zip(model.blocks, levels, strict=True):
        linears = linears_of(block)
        for name, scores in scores_of(block, states).items():
            few, more = divmod(round(level * scores.numel()), len(scores))
            for row, order in enumerate(scores.argsort(dim=1, stable=True)):
                linears[name].weight[row, order[: few + (row < more)]] = 0
        states = [block(x) for x in states]
    return model


class Result(NamedTuple):
    """One row: what was done, at which level, losses of held-out sequences, levels of blocks."""

    name: str
    level: float
    losses: Tensor
    blocks: list[float]
    seconds: float

    @property
    def perplexity(self) -> float:
        return perplexity(self.losses)


def measure(steps: int, seed: int) -> Iterator[Result]:
    """Train a model, prune copies of it, and judge them."""
    text, held_out = load_text()
    torch.manual_seed(seed)
    model = LanguageModel()
    for _ in train(model, text, steps):
        pass
    model.eval().requires_grad_(False)
    batches = list(sample(text, 256, torch.Generator().manual_seed(2))[:, :-1].split(64))
    yield Result("dense", 0.0, judge(model, held_out), [], 0.0)

    def pruned(name, level, mapping, **options) -> Result:
        found, report = fxs.prune(
            copy.deepcopy(model), fxs.WandaSparsifier(), batches, mapping, progress=False, **options
        )
        blocks = [
            sum(row.level for row in report.rows if f"blocks.{n}." in row.fqn) / 5
            for n in range(len(model.blocks))
        ]
        return Result(name, level, judge(found, held_out), blocks, report.seconds)

    for level in LEVELS:
        even = fxs.SparsityMapping().set_module_name_regex("blocks", f"unstructured {level:.0%}")
        for name, rule in RULES.items():
            yield pruned(name, level, even, allocation=rule())
        levels = reference_levels(model, batches, level)
        mapping = fxs.SparsityMapping()
        for place, found in enumerate(levels):
            mapping.set_module_name_regex(
                rf"blocks\.{place}\.", SparsityConfig("unstructured", found)
            )
        yield pruned("OWL, plainly", level, mapping)
        yield pruned("blocks", level, even, sequential="blocks")
        levels = [level] * len(levels)
        flow = judge(reference_flow(model, batches, levels), held_out)
        yield Result("blocks, plainly", level, flow, levels, 0.0)


def verdicts(results: Sequence[Result]) -> Iterator[tuple[str, bool]]:
    """Each bar with what was measured, and whether it was met."""
    found = {(result.name, result.level): result for result in results}
    for level in LEVELS:
        at = {name: result for (name, of), result in found.items() if of == level}
        for name, bar in BARS.items():
            ours = at[name]
            if name == "blocks":
                apart = ours.losses - at["blocks, plainly"].losses
                gap, noise = apart.mean().item(), apart.std().item() / len(apart) ** 0.5
                yield f"{level:.0%}: {bar}: {gap:+.5f} ± {noise:.5f} nats", abs(gap) <= 2 * noise
                continue
            theirs = at["OWL, plainly" if name == "OWL" else "uniform"].perplexity
            share = ours.perplexity / theirs
            met = share <= (1.005 if name == "OWL" else 1.0)
            yield f"{level:.0%}: {bar}: {share:.4f} of it", met


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_allocation")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--list", action="store_true", help="name the bars, and do not run")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of its training")
    options = parser.parse_args(arguments)
    if options.list:
        print(*BARS.values(), sep="\n")
        return 0
    results = list(measure(options.steps, options.seed))
    rows = [
        (
            result.name,
            f"{result.level:.0%}",
            f"{result.perplexity:.3f}",
            " ".join(f"{level:.1%}" for level in result.blocks),
            f"{result.seconds:.1f}",
        )
        for result in results
    ]
    table = format_table(["Wanda", "level", "perplexity", "of the blocks", "seconds"], rows)
    judged = list(verdicts(results))
    lines = [f"{text}; {'met' if met else 'MISSED'}" for text, met in judged]
    head = f"{options.steps} steps of training, seed {options.seed}; perplexity a byte"
    printed = "\n".join([head, "", table, "", *lines])
    print(printed)
    if options.write:
        TABLE.write_text(printed + "\n")
    return int(options.check and not all(met for _, met in judged))


if __name__ == "__main__":
    sys.exit(main())
