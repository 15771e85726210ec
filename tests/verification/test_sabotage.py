"""Each backend, tampered with: the gate names the weight and the fault."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization as tq

import fx_sparsity as fxs
from fx_sparsity.quantization import get_backend
from fx_sparsity.verification import SparsityLostError, read_weights
from tests.models import make

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")
BACKENDS = ("eager", "fx", "pt2e", "torchao")


class Pair(nn.Module):
    """A table and two linears."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = (
            nn.Embedding(40, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 8),
        )

    def forward(self, index):
        return self.second(torch.relu(self.first(self.table(index))))


def sparse():
    """(the dense model, the sparse one, inputs, record)."""
    torch.manual_seed(0)
    dense, inputs = Pair().eval(), (torch.randint(40, (6,)),)
    model, sparsifier = copy.deepcopy(dense), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    return dense, model, inputs, record


def quantize(backend, model, inputs, config=None):
    weights = fxs.find_weights(model, inputs)
    return get_backend(backend).quantize(model, inputs, weights, config=config)


def faults(verification):
    return {row.fqn: row.faults for row in verification if row.faults}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fqn", ["table.weight", "first.weight"])
def test_a_flipped_code(backend, fqn):
    dense, model, inputs, record = sparse()
    quantized, meant = quantize(backend, model, inputs)
    alone = quantize(backend, dense, inputs).model
    assert meant == {"table.weight", "first.weight", "second.weight"}
    assert fxs.verify(quantized, record, reference=alone, meant=meant).raise_if_lost().ok
    stored = next(w for w in read_weights(quantized) if w.fqn == fqn)
    row, column = (~record[fqn].keep).nonzero()[5]
    codes = stored.data.clone()
    codes[row, column] += 1 if codes[row, column] < stored.code_range[1] else -1
    stored.write(codes)
    lost = ("1 of 640 zeros lost" if fqn == "table.weight" else "1 of 512 zeros lost",)
    verification = fxs.verify(quantized, record, reference=alone, meant=meant)
    assert faults(verification) == {fqn: (*lost, "pattern 2:4 broken")}
    with pytest.raises(SparsityLostError, match=f"^{fqn}: "):
        verification.raise_if_lost()


def skip_second(backend):
    """A configuration that leaves `second` in float, as a bug or a careless user might."""
    if backend == "eager":
        return {nn.Embedding: get_default("eager")[nn.Embedding]}
    if backend == "fx":
        return get_default("fx").set_module_name("first", None).set_module_name("second", None)
    if backend == "pt2e":
        from fx_sparsity.quantization.pt2e import EmbeddingQuantizer

        return EmbeddingQuantizer()
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis

    return {nn.Embedding: IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))}


def get_default(backend):
    from fx_sparsity.quantization.torch_ao.eager import default_qconfigs
    from fx_sparsity.quantization.torch_ao.fx import default_qconfig_mapping

    return default_qconfigs() if backend == "eager" else default_qconfig_mapping()


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_layers(backend):
    _, model, inputs, record = sparse()
    _, meant = quantize(backend, model, inputs)
    quantized, fewer = quantize(backend, model, inputs, skip_second(backend))
    assert fewer == {"table.weight"}
    skipped = dict.fromkeys(
        ("first.weight", "second.weight"), ("meant to be quantized, left in float",)
    )
    assert faults(fxs.verify(quantized, record, meant=meant)) == skipped
    assert fxs.verify(quantized, record, meant=fewer).ok


def stock(backend):
    """The backend's own way with embeddings, whose zero points are fractions."""
    if backend == "eager":
        return {nn.Embedding: tq.float_qparams_weight_only_qconfig}
    if backend == "fx":
        mapping = tq.QConfigMapping()
        return mapping.set_object_type(nn.Embedding, tq.float_qparams_weight_only_qconfig)
    from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer

    return EmbeddingQuantizer()


@pytest.mark.parametrize("backend", ["eager", "fx", "pt2e"])
def test_a_stock_observer_with_fractional_zero_points(backend):
    _, model, inputs, record = sparse()
    quantized, _ = quantize(backend, model, inputs, stock(backend))
    (lost,) = faults(fxs.verify(quantized, record)).items()
    assert lost[0] == "table.weight"
    assert "zeros lost" in lost[1][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_record_the_rows_tell_what_there_is(backend):
    _, model, inputs, _ = sparse()
    quantized, _ = quantize(backend, model, inputs)
    rows = {row.where if backend == "pt2e" else row.fqn: row for row in fxs.verify(quantized)}
    found = [row for row in rows.values() if row.quantized]
    assert len(found) == 3
    for row in found:
        assert row.pattern == "2:4"
        assert 0.5 <= row.sparsity < 0.56
        assert row.faults == ()


def test_without_a_record_a_float_model():
    model, inputs = make("recommender")
    sparsifier = fxs.WeightNormSparsifier()
    mapping = fxs.SparsityMapping().set_object_type("embedding_bag", "rows 50%")
    fxs.prepare(model, sparsifier, inputs, mapping)
    sparsifier.step()
    model, _ = fxs.squash(model, sparsifier)
    patterns = {row.fqn: row.pattern for row in fxs.verify(model)}
    assert patterns["tables.0.weight"] == "rows 50%"
    assert patterns["top.0.weight"] is None
