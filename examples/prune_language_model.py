"""Train a small language model, prune it by every method, and compare what is left.

    pip install -e ".[demo]" && python examples/prune_language_model.py

A byte-level transformer learns the sources of Python's standard library, which every installation
carries, for a few minutes on two cores. Then each method prunes a copy of it from the same 256
sequences of 64 bytes, and is judged by its perplexity on files that were never seen.
"""

import argparse
import copy
import itertools
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import fx_sparsity as fxs
from fx_sparsity.pruning.methods import (
    ALPS,
    CalibratedSparsifier,
    ExactUpdate,
    ReorderedSparseGPTSparsifier,
    Swaps,
)

CONTEXT = 64


def rotate(x: Tensor) -> Tensor:
    """Turns pairs of [..., time, width] by angles that grow with time (RoPE, arXiv 2104.09864)."""
    time_, half = x.shape[-2], x.shape[-1] // 2
    speeds = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(time_, device=x.device).unsqueeze(1) * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Attention and a gated MLP, each normalized before."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, 3 * dim, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, dim] to the same."""
        batch, time_, dim = x.shape
        packed = self.qkv(self.norm_1(x)).view(batch, time_, 3, self.heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time_, dim))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """Logits of the next byte, [batch, time, 256], from bytes [batch, time]."""

    def __init__(self, dim: int = 96, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def load_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and bytes of other files to judge by."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, file in enumerate(files):
        parts[i % 10 == 0].append(file.read_bytes())
    train, held_out = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts
    )
    return train.long(), held_out.long()


def sample(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random sequences, [count, CONTEXT + 1]."""
    starts = torch.randint(len(text) - CONTEXT - 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def losses(model: nn.Module, sequences: Tensor) -> Tensor:
    """Cross-entropy of the next byte, in nats: the mean of each sequence, [count]."""
    logits = model(sequences[:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, sequences[:, 1:], reduction="none").mean(1)


def train(model: nn.Module, text: Tensor, steps: int) -> Iterator[float]:
    """Adam with a cosine over the steps; yields the loss of each."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, 20 * done + 0.02) * (1 + math.cos(math.pi * done)) / 2
        loss = losses(model, sample(text, 16, torch.default_generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def judge(model: nn.Module, text: Tensor, count: int = 1024) -> Tensor:
    """Losses of `count` sequences, always the same."""
    sequences = sample(text, count, torch.Generator().manual_seed(1))
    return torch.cat([losses(model, batch) for batch in sequences.split(128)])


def perplexity(found: Tensor) -> float:
    """A byte, from the losses of sequences."""
    return math.exp(found.mean().item())


METHODS: dict[str, Callable[[], CalibratedSparsifier]] = {
    "magnitude": fxs.MagnitudeSparsifier,
    "Wanda": fxs.WandaSparsifier,
    "SparseGPT": fxs.SparseGPTSparsifier,
    "SparseGPT + exact": lambda: fxs.Pipeline(fxs.SparseGPTSparsifier(), ExactUpdate()),
    "ALPS": ALPS,
    "reordered + swaps": lambda: fxs.Pipeline(ReorderedSparseGPTSparsifier(), Swaps()),
    "reordered + swaps + exact": lambda: fxs.Pipeline(
        ReorderedSparseGPTSparsifier(), Swaps(), ExactUpdate()
    ),
}
BEST = "reordered + swaps + exact"
ORDER = (BEST, "SparseGPT", "Wanda", "magnitude")
"""From the best, as is to be expected."""
PATTERNS = ("unstructured 50%", "unstructured 60%", "unstructured 70%", "2:4", "4:8")


class Measured(fxs.Pipeline):
    """A method that also asks for the Gram matrix, so that the report has its layers' errors."""

    def __init__(self, method: CalibratedSparsifier) -> None:
        super().__init__(method)
        self.needs = method.needs | {"gram"}


def layer_errors(model: nn.Module, batches: list[Tensor], mapping: fxs.SparsityMapping) -> Table:
    """Errors of single layers at 2:4, all on the inputs of the dense model."""
    reports = {
        name: fxs.prune(
            copy.deepcopy(model), Measured(method()), batches, mapping, sequential=False
        )[1]
        for name, method in METHODS.items()
    }
    table = Table(title="\nErrors of single layers at 2:4, same inputs", title_justify="left")
    for column in (
        "method",
        "mean squared error, SparseGPT = 1",
        "layers where SparseGPT is better",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    base = reports["SparseGPT"]
    for name, report in reports.items():
        ratios = [(report[f].error or 0) ** 2 / (base[f].error or 1) ** 2 for f in report]
        worse = sum(ratio > 1 for ratio in ratios)
        table.add_row(name, f"{sum(ratios) / len(ratios):.3f}", f"{worse} of {len(ratios)}")
    return table


def peak_memory() -> float | None:
    """The most resident memory of this process since the last call, in MiB; Linux only."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): forgets the peak
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def order(pattern: str, found: dict[str, Tensor], dense: Tensor) -> Iterator[str]:
    """Whether the methods come in the order that papers report, and by how much."""
    named = {"dense": dense, **{name: found[name] for name in ORDER}}
    for (better, a), (worse, b) in itertools.pairwise(named.items()):
        gap, noise = (b - a).mean().item(), (b - a).std().item() / len(a) ** 0.5
        verdict = "met" if gap > 0 else "MISSED"
        yield f"{pattern}: {better} before {worse}, {gap:+.4f} ± {noise:.4f} nats: {verdict}"


def main() -> None:
    """Train, prune, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=6000, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of its training")
    parser.add_argument("--write", type=Path, help="a file that gets what is printed")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120, record=True)
    text, held_out = load_text()
    torch.manual_seed(arguments.seed)
    model = LanguageModel()
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes; "
        f"{arguments.steps} steps on {torch.get_num_threads()} threads"
    )
    start = time.monotonic()
    for step, loss in enumerate(train(model, text, arguments.steps)):
        if step % 500 == 0:
            console.print(f"{time.monotonic() - start:.0f} s, step {step}: {loss:.3f} nats a byte")
    model.eval().requires_grad_(False)
    calibration = sample(text, 256, torch.Generator().manual_seed(2))[:, :-1]
    batches = list(calibration.split(64))
    dense = judge(model, held_out)

    results = Table(
        title=f"\nPerplexity a byte on unseen files (dense: {perplexity(dense):.3f})",
        title_justify="left",
    )
    results.add_column("method")
    for column in (*PATTERNS, "seconds at 2:4", "peak MiB", "statistics"):
        results.add_column(column, justify="right")
    found: dict[str, dict[str, Tensor]] = {pattern: {} for pattern in PATTERNS}
    for name, method in METHODS.items():
        cells, costs = [], []
        for pattern in PATTERNS:
            mapping = fxs.SparsityMapping().set_module_name_regex("blocks", pattern)
            peak_memory()
            pruned, report = fxs.prune(copy.deepcopy(model), method(), batches, mapping)
            peak = peak_memory()
            if pattern == "2:4":
                costs.append(f"{report.seconds:.1f}")
                costs.append("-" if peak is None else f"{peak:.0f}")
                costs.append(f"{report.statistics_bytes / 2**20:.1f}")
            found[pattern][name] = judge(pruned, held_out)
            cells.append(f"{perplexity(found[pattern][name]):.3f}")
        results.add_row(name, *cells, *costs)
    console.print(results)
    for pattern in ("2:4", "unstructured 70%"):
        for line in order(pattern, found[pattern], dense):
            console.print(line)
    mapping = fxs.SparsityMapping().set_module_name_regex("blocks", "2:4")
    console.print(layer_errors(model, batches, mapping))
    if arguments.write:
        arguments.write.write_text(console.export_text())


if __name__ == "__main__":
    main()
