"""A recommender of torchrec's parts, or of ones shaped like these, from discovery to a file."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.pruning.methods.criterion import CriterionSparsifier
from fx_sparsity.quantization import get_backend
from fx_sparsity.storage import parameters_on_meta
from tests.recommenders import DLRM, PARTS, parts, requests

GOODS = "bags.embedding_bags.goods.weight"
SHOPS = "bags.embedding_bags.shops.weight"
HISTORY = "lists.embeddings.history.weight"
TABLES = [GOODS, SHOPS, HISTORY]
MAPPING = (
    fxs.SparsityMapping()
    .set_object_type(nn.EmbeddingBag, "rows 50%")
    .set_object_type(nn.Embedding, "rows 50%")
)

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorials" / "recommender.md"


@pytest.fixture(params=PARTS)
def rec(request):
    return parts(request.param)


def make(rec, **options):
    torch.manual_seed(0)
    return DLRM(rec, **options).eval()


def sparse(rec, **options):
    """A model without half of its rows, and its record."""
    model, sparsifier = make(rec, **options), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, requests(rec, **options), MAPPING)
    sparsifier.step()
    return fxs.squash(model, sparsifier)


def assert_alike(found, model, rec, **options):
    """The same scores, also of requests whose bags are split otherwise than those of the example."""
    for seed in range(3):
        batch = requests(rec, seed=seed, **options)
        torch.testing.assert_close(found(*batch), model(*batch))


@pytest.mark.parametrize("named", [False, True])
def test_every_table_is_found(rec, named):
    inputs = requests(rec)
    given = dict(zip(("dense", "bags", "lists"), inputs, strict=True)) if named else inputs
    weights = fxs.find_weights(make(rec), given)
    assert weights.frontend == "torch.export"
    assert not weights.dense
    found = {site.fqn: (site.kind, site.roles, len(site.uses)) for site in weights.sites}
    assert {fqn: found[fqn] for fqn in TABLES} == {
        GOODS: ("embedding_bag", ("row", "dim"), 2),  # by two features
        SHOPS: ("embedding_bag", ("row", "dim"), 1),
        HISTORY: ("embedding", ("row", "dim"), 1),
    }
    assert len(found) == 6


def test_pruned_rows_stay_out_of_training(rec):
    model, sparsifier = make(rec).train(), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, requests(rec), MAPPING)
    sparsifier.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for seed in range(3):
        optimizer.zero_grad()
        model(*requests(rec, seed=seed)).square().mean().backward()
        optimizer.step()
    masks = {fqn: sparsifier.get_mask(fqn).clone() for fqn in TABLES}
    model, record = fxs.squash(model, sparsifier)
    fxs.verify(model, record).raise_if_lost()
    for fqn, mask in masks.items():
        table = model.get_parameter(fqn)
        assert (table == 0).all(1).sum() == len(table) // 2
        assert not table[~mask].any()


def lookups(batches, feature, rows, weigh):
    """Sum of the squares of what each row of a table adds to bags, counted one by one."""
    found = torch.zeros(rows)
    for _, bags, _ in batches:
        jagged = bags.to_dict()[feature]
        start = 0
        for length in jagged.lengths().tolist():
            bag = torch.zeros(rows)
            for i in range(start, start + length):
                bag[jagged.values()[i]] += weigh(jagged, i, length)
            found += bag.square()
            start += length
    return found


@pytest.mark.parametrize("is_weighted", [False, True])
def test_lookups_are_counted(rec, is_weighted):
    """Of requests of one shape, too, whose bags are split in different ways."""
    _, bags, lists = requests(rec, is_weighted=is_weighted, seed=1)
    turned = rec.KeyedJaggedTensor.from_lengths_sync(
        ["bought", "seen", "shop"],
        torch.cat([j.values() % 100 for j in bags.to_dict().values()]),
        torch.cat([j.lengths() for j in bags.to_dict().values()]).flip(0),
        torch.cat([j.weights() for j in bags.to_dict().values()]) if is_weighted else None,
    )
    batches = [(torch.randn(8, 13), given, lists) for given in (bags, turned)]
    seen = []

    def note(weight, stats):
        seen.append(stats.squares[0])
        return weight.abs()

    method = CriterionSparsifier(note, needs={"input_norm"})
    model = make(rec, is_weighted=is_weighted)
    fxs.prune(model, method, batches, MAPPING)

    def weigh(jagged, i, length):
        return jagged.weights()[i] if is_weighted else 1.0

    def mean(jagged, i, length):
        return jagged.weights()[i] if is_weighted else 1 / length

    goods = sum(lookups(batches, feature, 500, weigh) for feature in ("bought", "seen"))
    by_size = {len(squares): squares for squares in seen}
    torch.testing.assert_close(by_size[500], goods)
    torch.testing.assert_close(by_size[100], lookups(batches, "shop", 100, mean))


@pytest.mark.parametrize(
    ("backend", "order"),
    [
        ("eager", "sparsify_first"),
        ("eager", "quantize_first"),
        ("pt2e", "sparsify_first"),
        ("torchao", "sparsify_first"),
        pytest.param("pt2e", "quantize_first", marks=pytest.mark.exhaustive),
    ],
)
def test_tables_are_quantized(rec, backend, order):
    _, proof = fxs.sparsify_and_quantize(
        make(rec),
        fxs.WeightNormSparsifier(),
        requests(rec),
        order=order,
        backend=backend,
        mapping=MAPPING,
    )
    proof.raise_if_lost()
    found = {row.fqn: row.dtype for row in proof}
    dtype = {"eager": "quint8", "pt2e": "uint8", "torchao": "int8"}[backend]
    assert found == dict.fromkeys(TABLES, dtype)


@pytest.mark.parametrize(("quantized", "is_weighted"), [(False, True), (True, False)])
def test_lowered_tables_look_up_the_same(rec, quantized, is_weighted):
    options = {"is_weighted": is_weighted}
    inputs = requests(rec, **options)
    model, record = sparse(rec, **options)
    if quantized:
        weights = fxs.find_weights(model, inputs)
        model, _ = get_backend("eager").quantize(model, inputs, weights)
    lowered, report = fxs.lower(copy.deepcopy(model), inputs, policy="always", record=record)
    fxs.verify(lowered, record).raise_if_lost()
    assert isinstance(lowered.bags.embedding_bags.goods, RowPrunedEmbeddingBag)
    assert isinstance(lowered.bags.embedding_bags.shops, RowPrunedEmbeddingBag)
    assert isinstance(lowered.lists.embeddings.history, RowPrunedEmbedding)
    width = 16 + 8 if quantized else 64  # with a scale and a zero point
    for fqn, rows in zip(TABLES, (500, 100, 300), strict=True):
        assert report[fqn].bytes_before == rows * width
        assert report[fqn].bytes_after == rows // 2 * width + rows * 4
    assert_alike(lowered, model, rec, **options)
    assert_alike(fxs.unlower(lowered), model, rec, **options)


@pytest.mark.parametrize("way", ["compile", "export"])
def test_lowered_models_are_captured(rec, way):
    model, _ = sparse(rec)
    inputs = requests(rec)
    expected = model(*inputs)
    lowered, _ = fxs.lower(model, inputs, policy="always")
    if way == "compile":
        found = torch.compile(lowered, backend="aot_eager")(*inputs)
    else:
        found = torch.export.export(lowered, inputs, strict=False).module()(*inputs)
    torch.testing.assert_close(found, expected)


def test_files(rec, tmp_path):
    model, record = sparse(rec)
    path = tmp_path / "model.safetensors"
    fxs.save(model, path)
    again = make(rec)
    fxs.load(path, model=again)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    with parameters_on_meta():
        lean = DLRM(rec).eval()
    report = fxs.load_sparse(path, lean)
    assert {row.fqn: row.module for row in report.rows} == {
        GOODS: "RowPrunedEmbeddingBag",
        SHOPS: "RowPrunedEmbeddingBag",
        HISTORY: "RowPrunedEmbedding",
    }
    fxs.verify(lean, record).raise_if_lost()
    assert_alike(lean, model, rec)


if "torchrec" in PARTS:

    def test_the_block_of_the_tutorial_that_needs_torchrec(capsys):
        page = TUTORIAL.read_text()
        (found,) = re.findall(
            r"^```console\n(import.*?)^```\n\n```text\n(.*?)^```", page, re.M | re.S
        )
        code, shown = found
        exec(compile(code, str(TUTORIAL), "exec"), {"__name__": "recommender"})
        assert capsys.readouterr().out == shown
