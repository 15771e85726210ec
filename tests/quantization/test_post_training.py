import copy

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import nn

from fx_sparsity import DataNormSparsifier, post_training_sparse_quantize
from fx_sparsity.quantization import read_weights
from tests.models import make

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")


class Table(nn.Embedding):
    """A user's subclass."""


def nested():
    torch.manual_seed(0)
    shared = nn.EmbeddingBag(20, 8, mode="sum")
    return nn.ModuleDict(
        {
            "a": nn.ModuleDict({"b": Table(30, 8, padding_idx=0)}),
            "a_b": nn.Embedding(30, 8),
            "first": shared,
            "second": shared,
            "mlp": nn.Linear(8, 8),
        }
    )


@pytest.mark.parametrize("sparsify_first", [True, False])
def test_masked_codes_mean_zero_in_both_orders(sparsify_first):
    model = nested()
    dense = copy.deepcopy(model)
    result = post_training_sparse_quantize(
        model, DataNormSparsifier, sparsify_first, sparsity_level=0.5, sparse_block_shape=(1, 1)
    )
    assert result is model
    assert model["first"] is model["second"]
    assert type(model["mlp"]) is nn.Linear
    assert isinstance(model["a"]["b"], nnq.Embedding)
    assert isinstance(model["first"], nnq.EmbeddingBag)
    stored = {w.fqn: w for w in read_weights(model) if w.quantized}
    assert set(stored) == {"a.b.weight", "a_b.weight", "first.weight"}
    for fqn, weight in stored.items():
        original = dense.get_parameter(fqn)
        zeros = weight.zeros()
        assert weight.dequantize()[zeros].eq(0).all()
        kept = ~zeros
        assert zeros.double().mean() >= 0.5
        assert zeros.double().mean() <= 0.52  # what rounding alone zeroes lies among the pruned
        step = weight.scale.expand_as(original)
        assert ((weight.dequantize() - original).abs()[kept] <= 0.51 * step[kept]).all()


@pytest.mark.parametrize("sparsify_first", [True, False])
def test_selection_touches_nothing_else(sparsify_first):
    model = nested()
    selected = [model["a"]["b"]]
    kept = model["a_b"]
    post_training_sparse_quantize(model, DataNormSparsifier, sparsify_first, selected)
    assert isinstance(model["a"]["b"], nnq.Embedding)
    assert model["a_b"] is kept


def test_a_root_embedding_comes_back_quantized():
    table = nn.Embedding(10, 8)
    quantized = post_training_sparse_quantize(table, DataNormSparsifier)
    assert isinstance(quantized, nnq.Embedding)
    assert read_weights(quantized)[0].zeros().double().mean() >= 0.5


def test_lookups_agree_with_the_dequantized_table():
    model = nested()
    post_training_sparse_quantize(model, DataNormSparsifier)
    index = torch.arange(5).unsqueeze(0).expand(3, -1)
    (table,) = (w for w in read_weights(model) if w.fqn == "a_b.weight")
    # torch's 8-bit lookup computes code * scale + bias, which leaves about 1e-7 of a zero.
    torch.testing.assert_close(model["a_b"](index), table.dequantize()[index], rtol=1e-5, atol=1e-5)


def test_bad_selections_change_nothing():
    model, _ = make("recommender")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="found Linear"):
        post_training_sparse_quantize(
            model, DataNormSparsifier, select_embeddings=[model.tables[0], model.top[0]]
        )
    with pytest.raises(ValueError, match="not part of the model"):
        post_training_sparse_quantize(
            model, DataNormSparsifier, select_embeddings=[nn.Embedding(2, 4)]
        )
    assert [type(m) for m in model.modules()] == kinds
