import warnings
from itertools import product

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.quantization import (
    BACKENDS,
    BackendError,
    ZeroNotRepresentableError,
    get_backend,
    read_weights,
    sparsify_and_quantize,
    sparsify_codes,
)
from fx_sparsity.sparsifier import SparsityRecord
from tests.models import make, make_bert
from tests.sparsifier.test_base import assert_unchanged, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")
ORDERS = ("sparsify_first", "quantize_first")
FLOWS = list(product(BACKENDS, ORDERS))
PATTERNS = ("unstructured 50%", "2:4", "block:2x4 50%", "rows 50%")


def flow(model, inputs, backend, order, pattern, **kwargs):
    mapping = fxs.SparsityMapping().set_global(pattern)
    return sparsify_and_quantize(
        model,
        fxs.WeightNormSparsifier(),
        inputs,
        order=order,
        backend=backend,
        mapping=mapping,
        **kwargs,
    )


@pytest.mark.parametrize("name", ["recommender", "tied"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("backend", "order"), FLOWS)
def test_zeros_survive_in_both_orders(name, pattern, backend, order):
    model, inputs = make(name)
    before = snapshot(model)
    quantized, verification = flow(model, inputs, backend, order, pattern)
    verification.raise_if_lost()
    assert_unchanged(model, before)
    weights = fxs.find_weights(model, inputs)
    assert {row.fqn for row in verification} == set(weights)
    assert verification.share == 1
    for row in verification:
        assert row.quantized == row.meant
        assert row.meant or (backend == "torchao" and "tables" in row.fqn)  # it has no bags
        assert row.zero_dequantized == row.wanted > 0
        assert row.extra == 0
    # Independent of the gate: count zeros in what torch itself dequantizes.
    for stored in read_weights(quantized):
        if stored.fqn in weights:
            site = weights[stored.fqn]
            share = (stored.dequantize() == 0).double().mean()
            assert share >= 0.5 - 1 / len(stored.data), site
    torch.testing.assert_close(quantized(*inputs).shape, model(*inputs).shape)


@pytest.mark.parametrize(("backend", "order"), FLOWS)
def test_the_output_stays_near_that_of_the_sparse_float_model(backend, order):
    model, inputs = make("recommender")
    weights = fxs.find_weights(model, inputs)
    alone = get_backend(backend).quantize(model, inputs, weights).model
    dense = model(*inputs)
    usual = (alone(*inputs) - dense).norm() / dense.norm()
    quantized, _ = flow(model, inputs, backend, order, "unstructured 50%")
    sparsifier = fxs.WeightNormSparsifier()
    mapping = fxs.SparsityMapping().set_global("unstructured 50%")
    fxs.prepare(model, sparsifier, inputs, mapping)
    sparsifier.step()
    expected = model(*inputs)
    error = (quantized(*inputs) - expected).norm() / expected.norm()
    assert error < 0.05 or error < 2 * usual  # static ranges cost more than dynamic ones


def test_quantize_first_keeps_scales_zero_points_and_other_codes():
    model, inputs = make("recommender")
    for backend in BACKENDS:
        weights = fxs.find_weights(model, inputs)
        quantized = get_backend(backend).quantize(model, inputs, weights).model
        before = {w.where: w for w in read_weights(quantized) if w.quantized}
        sparsifier = fxs.WeightNormSparsifier()
        mapping = fxs.SparsityMapping().set_global("2:4")
        record = sparsify_codes(quantized, sparsifier, weights, mapping)
        for after in read_weights(quantized):
            if after.fqn not in record:
                continue
            keep = record[after.fqn].keep
            if not after.quantized:
                continue
            assert torch.equal(after.scale, before[after.where].scale)
            assert torch.equal(after.zero_point, before[after.where].zero_point)
            assert torch.equal(after.data[keep], before[after.where].data[keep])
            assert after.dequantize()[~keep].eq(0).all()


@pytest.mark.parametrize(("backend", "order"), FLOWS)
def test_a_bert_whose_index_is_expanded(backend, order):
    model, inputs = make_bert()
    if backend == "fx":
        with pytest.raises(BackendError, match="prepare_fx does not take this BertModel"):
            flow(model, inputs, backend, order, "2:4")
        return
    quantized, verification = flow(model, inputs, backend, order, "2:4")
    verification.raise_if_lost()
    assert any("embeddings" in row.fqn for row in verification)
    output = quantized(**inputs)
    assert torch.isfinite(output.last_hidden_state).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_weights_and_partial_mappings(backend):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pooler = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.body(x)
            self.pooler(x)
            return x

    _, verification = flow(Pooled().eval(), (torch.randn(2, 8),), backend, ORDERS[0], "2:4")
    assert [row.fqn for row in verification.raise_if_lost()] == ["body.weight"]


def test_functional_linears_are_quantized_in_a_graph():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))

        def forward(self, x):
            linear = nn.functional.linear
            return linear(nn.functional.relu(linear(x, self.first)), self.second)

    torch.manual_seed(0)
    for order in ORDERS:
        _, verification = flow(Functional(), (torch.randn(2, 8),), "pt2e", order, "2:4")
        assert [row.quantized for row in verification.raise_if_lost()] == [True, True]


def test_stock_embedding_zero_points_are_refused_when_masking_codes():
    from torch.ao import quantization as tq

    model, inputs = make("recommender")
    weights = fxs.find_weights(model, inputs)
    config = {nn.EmbeddingBag: tq.float_qparams_weight_only_qconfig}
    quantized = get_backend("eager").quantize(model, inputs, weights, config=config).model
    before = {w.where: w.data.clone() for w in read_weights(quantized)}
    with pytest.raises(ZeroNotRepresentableError, match=r"tables.0.weight.*expected integer zero"):
        sparsify_codes(quantized, fxs.WeightNormSparsifier(), weights)
    assert all(torch.equal(w.data, before[w.where]) for w in read_weights(quantized))


def test_the_quantized_graph_compiles():
    model, inputs = make("recommender")
    quantized, _ = flow(model, inputs, "pt2e", ORDERS[0], "2:4")
    with torch.no_grad():
        expected = quantized(*inputs)
        torch._dynamo.reset()
        actual = torch.compile(quantized)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_the_quantized_graph_keeps_no_float_weight():
    model, inputs = make("recommender")
    quantized, _ = flow(model, inputs, "pt2e", ORDERS[0], "2:4")
    matrices = [t for t in quantized.state_dict().values() if t.ndim == 2]
    assert matrices
    assert not any(t.is_floating_point() for t in matrices)


def test_bad_requests():
    model, inputs = make("recommender")
    with pytest.raises(ValueError, match="order: expected one of sparsify_first, quantize_first"):
        flow(model, inputs, "eager", "first", "2:4")
    with pytest.raises(
        BackendError, match="expected one of eager, fx, pt2e, torchao, found 'gptq'"
    ):
        flow(model, inputs, "gptq", ORDERS[0], "2:4")
    with pytest.raises(fxs.MappingError, match=r"bottom.0.weight"):
        flow(model, inputs, "eager", ORDERS[1], "4:8")


def test_no_warning_is_left_behind():
    model, inputs = make("recommender")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flow(model, inputs, "eager", ORDERS[0], "2:4")
    assert [
        str(w.message) for w in caught if "ao.quantization is deprecated" in str(w.message)
    ] == []


def test_records_of_both_orders_say_the_same():
    model, inputs = make("sequential")
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    _, record = fxs.squash(model, sparsifier)
    assert isinstance(record, SparsityRecord)
    assert {(m.pattern, m.level, m.roles) for m in record.values()} == {("2:4", 0.5, ("out", "in"))}
