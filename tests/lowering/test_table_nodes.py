"""Tables that a graph holds itself: in GraphModules and programs, as floats and as codes."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fx_sparsity import find_weights, lower, unlower, verify
from fx_sparsity.kernels import PackingError
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.lowering import check_packed
from fx_sparsity.quantization import get_backend

ROWS, DIM = 60, 16
INDICES = torch.tensor([3, 9, 9, 0, 59, 4, 7, 3, 8, 12, 58, 1])
OFFSETS = torch.tensor([0, 3, 3, 7])
SAMPLES = torch.linspace(-1, 2, len(INDICES))


class Tables(nn.Module):
    """Bags of every kind, an embedding, and a bare parameter of two uses."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(ROWS, DIM, padding_idx=3)
        self.bags = nn.ModuleList(
            [
                nn.EmbeddingBag(ROWS, DIM, mode="mean"),
                nn.EmbeddingBag(ROWS, DIM, mode="max", padding_idx=9),
                nn.EmbeddingBag(ROWS, DIM, mode="sum", include_last_offset=True, padding_idx=-1),
            ]
        )
        self.table = nn.Parameter(torch.randn(ROWS, DIM))

    def forward(self, indices, offsets, samples):
        mean, largest, total = self.bags
        end = torch.cat([offsets, offsets.new_full((1,), len(INDICES))])
        again = F.embedding_bag(indices, self.table, offsets)
        return (
            self.embed(indices).sum(0),
            mean(indices, offsets) + largest(indices, offsets),
            total(indices, end, per_sample_weights=samples) + again,
            F.embedding(indices, self.table),
        )


def halved(model):
    """Without every other row; those of padding are no zeros."""
    for parameter in model.parameters():
        parameter.data.normal_()[::2] = 0
    return model.eval().requires_grad_(False)


def traced(model):
    """With the functions that modules call, and their tables, in the graph itself."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return False

    return fx.GraphModule(model, Tracer().trace(model))


def decomposed(model, x):
    return torch.export.export(model, x).run_decompositions({})


WAYS = {
    "graph": lambda model, x: torch.export.export(model, x).module(),
    "trace": lambda model, x: traced(model),
    "program": torch.export.export,
    "decomposed": decomposed,
    "decomposed graph": lambda model, x: decomposed(model, x).module(),
}
X = (INDICES, OFFSETS, SAMPLES)
EACH = {"embed.weight", "table", *(f"bags.{i}.weight" for i in range(3))}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_tables_of_a_graph_look_up_the_same(way):
    torch.manual_seed(0)
    model = halved(Tables())
    expected = model(*X)
    subject = WAYS[way](model, X)
    lowered, report = lower(subject, None if "program" in way else X, policy="always")
    assert {row.fqn for row in report.rows if row.kernel == "rows"} == EACH
    before = sum(row.bytes_before for row in report.rows)
    after = sum(row.bytes_after for row in report.rows)
    assert before == 5 * ROWS * DIM * 4
    assert after == 5 * (ROWS // 2 * DIM * 4 + ROWS * 4)  # the table of two uses is there once
    run = lowered if isinstance(lowered, nn.Module) else lowered.module()
    torch.testing.assert_close(run(*X), expected)
    other = (INDICES.flip(0), torch.tensor([0, 1, 6, 9]), SAMPLES)
    torch.testing.assert_close(run(*other), model(*other))
    assert {row.fqn: row.sparsity for row in verify(lowered)} == dict.fromkeys(EACH, 0.5)
    check_packed(lowered)
    if isinstance(lowered, nn.Module):
        lowered.graph.lint()
        torch.testing.assert_close(unlower(lowered)(*X), expected)


@torch.no_grad()
def test_codes_behind_a_dequantization():
    torch.manual_seed(0)
    model = halved(Tables())
    quantized, _ = get_backend("pt2e").quantize(model, X, find_weights(model, X))
    expected = quantized(*X)
    lowered, report = lower(copy.deepcopy(quantized), X, policy="always")
    assert {row.fqn for row in report.rows if row.kernel == "rows"} == EACH
    assert sum(row.bytes_before for row in report.rows) == 5 * ROWS * (DIM + 8)
    assert sum(row.bytes_after for row in report.rows) == 5 * (ROWS // 2 * (DIM + 8) + ROWS * 4)
    torch.testing.assert_close(lowered(*X), expected)
    kinds = {type(m) for name, m in lowered.named_modules() if name.endswith(("weight", "table"))}
    assert {RowPrunedEmbedding, RowPrunedEmbeddingBag} <= kinds
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*X), expected)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.long, self.part, self.counted = (
            nn.Parameter(torch.randn(ROWS, DIM)) for _ in range(3)
        )
        self.register_buffer("numbers", torch.zeros(ROWS, DIM, dtype=torch.int64))

    def forward(self, indices, offsets):
        found, _, size, _ = torch.embedding_bag(
            self.counted, indices, offsets, False, 1, False, None, False, None
        )
        rescaled = F.embedding(indices, self.long, max_norm=1.0)
        part, numbers = F.embedding(indices, self.part[:, :8]), F.embedding(indices, self.numbers)
        return rescaled, part, found, size, numbers


@torch.no_grad()
def test_what_no_kernel_serves_stays_dense_with_the_reason():
    model = halved(Odd())
    graph = traced(model)
    expected = model(*X[:2])
    graph, report = lower(graph, X[:2], policy="always")
    assert not report.lowered
    torch.testing.assert_close(graph(*X[:2]), expected)
    assert report.dense["long"] == "its rows are rescaled at each call"
    assert report.dense["part"] == "it looks up in a part of its weight, or in what was made of it"
    program = torch.export.export(halved(Odd()), X[:2])
    _, report = lower(program, policy="always")
    assert report.dense["counted"] == "more of its results is read than the bags"


class Shortened(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Embedding(ROWS, DIM, max_norm=1.0)
        self.bag = nn.EmbeddingBag(ROWS, DIM, max_norm=0.5, mode="sum")

    def forward(self, indices):
        return self.one(indices) + self.bag(indices.unsqueeze(1))


@torch.no_grad()
@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_table_whose_rows_are_shortened_at_each_call_stays_dense(decomposed):
    model = halved(Shortened())
    program = torch.export.export(model, X[:1])
    program = program.run_decompositions() if decomposed else program
    program, report = lower(program, policy="always")
    assert set(report.dense.values()) == {"the graph writes to it, as lookups with max_norm do"}
    torch.testing.assert_close(program.module()(X[0]), model(X[0]))


@torch.no_grad()
def test_a_corrupt_table_of_a_program_is_named():
    program, _ = lower(torch.export.export(halved(Tables()), X), policy="always")
    program.state_dict["fx_sparsity_kernels.embed.weight.remap"][0] = 99
    with pytest.raises(PackingError, match=r"^embed.weight: remap sends index 0 to row 99"):
        check_packed(program)
