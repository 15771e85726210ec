import warnings
from itertools import product

import pytest
import torch
import transformers
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

import fx_sparsity as fxs
from fx_sparsity.graph import MappingError
from fx_sparsity.quantization import (
    BACKENDS,
    BackendError,
    get_backend,
    sparsify_and_quantize,
    sparsify_codes,
)
from fx_sparsity.sparsifier import RecordedMasks
from fx_sparsity.verification import ZeroNotRepresentableError, read_weights
from tests.models import make, make_bert
from tests.sparsifier.test_base import assert_unchanged, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")
ORDERS = ("sparsify_first", "quantize_first")
FLOWS = list(product(BACKENDS, ORDERS))


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


@pytest.mark.parametrize("order", ORDERS)
def test_the_masks_of_a_record_are_the_flow_s(order):
    """A pruned model keeps its zeros and gets no others: the head is in no record."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    inputs, sparsifier = (torch.randn(4, 16),), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, {"module_name": {"0": "2:4"}})
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    _, proof = sparsify_and_quantize(
        model, RecordedMasks(record), inputs, order=order, backend="pt2e"
    )
    (row,) = proof.raise_if_lost()
    assert (row.fqn, row.dtype, row.pattern) == ("0.weight", "int8", "2:4")
    assert torch.equal(proof.record["0.weight"].keep, record["0.weight"].keep)


@pytest.mark.parametrize("name", ["recommender", "tied"])
@pytest.mark.parametrize("pattern", ["2:4", "rows 50%"])  # the matrix has the others
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
def test_dead_weights(backend):
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
    with pytest.raises(MappingError, match=r"bottom.0.weight"):
        flow(model, inputs, "eager", ORDERS[1], "4:8")


def test_no_warning_is_left_behind():
    model, inputs = make("recommender")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flow(model, inputs, "eager", ORDERS[0], "2:4")
    assert [
        str(w.message) for w in caught if "ao.quantization is deprecated" in str(w.message)
    ] == []


def quietly(prepared):
    """Training that changes nothing."""


@pytest.mark.parametrize("name", ["sequential", "tied"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_orders_check_the_same_copies_of_the_same_weights(backend, name):
    model, inputs = make(name)
    rows = {}
    for order in (*ORDERS, "interleaved", "qat"):
        if order == "interleaved" and backend == "torchao":
            continue
        calibrate = quietly if order == "qat" else None
        _, verification = flow(model, inputs, backend, order, "2:4", calibrate=calibrate)
        rows[order] = sorted((row.fqn, row.pattern, row.wanted) for row in verification)
    assert all(found == rows["sparsify_first"] for found in rows.values()), rows
    if name == "tied":
        assert [fqn for fqn, *_ in rows["qat"]].count("embed.weight") == 2


def test_a_float_copy_that_something_else_reads_is_masked_and_checked_too():
    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            linear = nn.functional.linear(x, self.weight)
            return linear + (x.unsqueeze(1) * self.weight).sum(-1)

    torch.manual_seed(0)
    model, inputs = TwoReaders(), (torch.randn(4, 16),)
    for order in (*ORDERS, "interleaved"):
        quantized, verification = flow(model, inputs, "pt2e", order, "2:4")
        assert [row.quantized for row in verification.raise_if_lost()] == [True, False]
        assert quantized.weight.eq(0).double().mean() == 0.5


@pytest.mark.parametrize("order", [*ORDERS, "interleaved"])
def test_a_failure_leaves_the_sparsifier_fresh(order):
    def fail(prepared):
        raise RuntimeError("out of data")

    model, inputs = make("sequential")
    sparsifier = fxs.WeightNormSparsifier()
    mapping = fxs.SparsityMapping().set_global("2:4")

    def run(calibrate):
        return sparsify_and_quantize(
            model,
            sparsifier,
            inputs,
            order=order,
            backend="eager",
            mapping=mapping,
            calibrate=calibrate,
        )

    with pytest.raises(RuntimeError, match="out of data"):
        run(fail)
    assert sparsifier.names == []
    run(None)[1].raise_if_lost()


@pytest.mark.parametrize("order", [*ORDERS, "interleaved"])
def test_a_mapping_that_masks_nothing(order):
    model, inputs = make("sequential")
    mapping = fxs.SparsityMapping().set_module_name_regex("tail", "2:4")
    with pytest.raises(MappingError, match="masks none of the weights 0.weight, 2.weight"):
        sparsify_and_quantize(
            model, fxs.WeightNormSparsifier(), inputs, order=order, backend="eager", mapping=mapping
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_partial_mappings_leave_the_rest_as_it_was(backend, order):
    model, inputs = make("sequential")
    weights = fxs.find_weights(model, inputs)
    alone = get_backend(backend).quantize(model, inputs, weights)
    quantized, verification = sparsify_and_quantize(
        model,
        fxs.WeightNormSparsifier(),
        inputs,
        order=order,
        backend=backend,
        mapping=fxs.SparsityMapping().set_module_name("2", "2:4"),
        reference=alone,
    )
    assert [row.fqn for row in verification.raise_if_lost()] == ["2.weight"]
    first = {w.fqn: w.data for w in read_weights(quantized)}["0.weight"]
    before = {w.fqn: w.data for w in read_weights(alone.model)}["0.weight"]
    assert torch.equal(first, before)


@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first"])
def test_what_stays_in_float_is_told(order, caplog):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    model, inputs = transformers.GPT2LMHeadModel(config).eval(), (torch.arange(8).view(1, 8),)
    mapping = fxs.SparsityMapping().set_module_name_regex(".*(c_attn|c_fc)", "unstructured 50%")
    _, verification = sparsify_and_quantize(
        *(model, fxs.WeightNormSparsifier(), inputs),
        order=order,
        backend="torchao",
        mapping=mapping,
        config=Int8WeightOnlyConfig(),
    )
    assert all(row.left_in_float and not row.faults for row in verification)
    assert str(verification).count("ok, in float") == len(verification) == 2
    assert "2 left in float" in verification.summary
    reason = "no key of `config` names it"
    assert {row.in_float for row in verification} == {reason}
    assert f"2 of 2 masked weights stay in float ({reason}): transformer.h.0" in caplog.text
    assert "transformer.h.0.attn.c_attn.weight" in caplog.text


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("eager", "`config` has no qconfig for the class Products"),
        ("fx", "torch no quantized operator, for bmm in the class Products"),
        ("pt2e", "the quantizer annotates no weight of bmm"),
    ],
)
def test_every_backend_says_why_a_weight_stays_in_float(backend, reason):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x):
            return torch.bmm(x, self.experts)

    model, inputs = Products().eval(), (torch.randn(2, 3, 16),)
    for order in ("sparsify_first", "quantize_first"):
        _, verification = sparsify_and_quantize(
            *(model, fxs.WeightNormSparsifier(), inputs), order=order, backend=backend
        )
        (row,) = verification.raise_if_lost()
        assert row.left_in_float
        assert row.in_float.endswith(reason)
