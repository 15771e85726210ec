"""What each order loses, on a real encoder and on a recommender with large tables.

    python -m tests.benchmarks.bench_orders --write

all-MiniLM-L6-v2 on sentences, and a DLRM with random weights whose tables have the sizes of the
Criteo data set, cut at 100,000 rows. For each backend, order and pattern: the share of masked
values that are zero in code space, and how far the outputs move from those of the model that is
quantized alike and dense (norm of the difference over the norm).
"""

import argparse
import logging
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import fx_sparsity as fxs
from examples.sparsify_minilm import load_encoder
from fx_sparsity.quantization import compare_orders
from fx_sparsity.reports import format_table

TABLE = Path(__file__).with_name("orders.txt")
PATTERNS = ("unstructured 50%", "2:4", "rows 50%")
# Distinct values of the 26 categorical features of the Criteo display advertising challenge.
CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)


class DLRM(nn.Module):
    """Bottom MLP, embedding bags, pairwise dot products, top MLP (arXiv 1906.00091)."""

    def __init__(self, dim: int = 64, most_rows: int = 100_000) -> None:
        super().__init__()
        self.bottom = nn.Sequential(
            *(nn.Linear(13, 256), nn.ReLU(), nn.Linear(256, dim), nn.ReLU())
        )
        rows = [min(size, most_rows) for size in CARDINALITIES]
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum") for n in rows)
        pairs = torch.tril_indices(len(rows) + 1, len(rows) + 1, offset=-1)
        self.register_buffer("pairs", pairs, persistent=False)
        width = dim + pairs.shape[1] + (-dim - pairs.shape[1]) % 4
        self.top = nn.Sequential(
            *(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1))
        )

    def forward(self, dense, indices):
        x = self.bottom(dense)
        vectors = torch.stack([x, *(t(indices[:, i]) for i, t in enumerate(self.tables))], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        crossed = products[:, self.pairs[0], self.pairs[1]]
        features = torch.cat([x, crossed], 1)
        return self.top(
            nn.functional.pad(features, (0, self.top[0].in_features - features.shape[1]))
        )


def make_dlrm():
    """A DLRM in eval mode, and a batch of 128 with two indices a bag."""
    torch.manual_seed(0)
    model = DLRM().eval()
    rows = torch.tensor([table.num_embeddings for table in model.tables])
    indices = (torch.rand(128, len(rows), 2) * rows[:, None]).long()
    return model, (torch.randn(128, 13), indices)


def rows_of(name, model, inputs, backends) -> Iterator[tuple[object, ...]]:
    """One line a backend, pattern and order."""
    kinds = {fqn: site.kind for fqn, site in fxs.find_weights(model, inputs).items()}
    for backend in backends:
        for pattern in PATTERNS:
            # The first linear has 13 inputs, which no 2:4 divides; the last has one row.
            mapping = fxs.SparsityMapping().set_global(pattern)
            if name == "DLRM" and pattern == "2:4":
                mapping.set_module_name("bottom.0", None)
            compared = compare_orders(
                model, fxs.WeightNormSparsifier(), inputs, backend=backend, mapping=mapping
            )
            for order, result in compared.items():
                found = result.verification.raise_if_lost()
                left = sum(not row.quantized for row in found)
                yield (
                    name,
                    backend,
                    pattern,
                    order,
                    f"{found.share:.1%}",
                    len(kinds),
                    left,
                    f"{compared.quantized:.4f}",
                    f"{result.error:.4f}",
                    f"{result.drift:.4f}",
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    header = (
        *("model", "backend", "pattern", "order", "zeros kept", "weights", "in float"),
        *("error, quantized alone", "error", "drift from quantized alone"),
    )
    encoder, sentences = load_encoder()
    dlrm, batch = make_dlrm()
    rows = [
        *rows_of("MiniLM", encoder, sentences, ("eager", "pt2e", "torchao")),
        *rows_of("DLRM", dlrm, batch, ("eager", "fx", "pt2e", "torchao")),
    ]
    text = (
        "Made by: python -m tests.benchmarks.bench_orders --write\n"
        f"torch {torch.__version__}, {platform.machine()}; magnitude, no data, no training\n\n"
        + format_table(header, rows)
        + "\n"
    )
    print(text)
    if arguments.write:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
