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
    assert set(stored) == {"a.b.weight", "a_b.weight", "first.weight", "second.weight"}
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


@pytest.mark.parametrize("sparsify_first", [True, False])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("last", [False, True])
def test_bags_reduce_as_they_did(sparsify_first, mode, padding, last):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.EmbeddingBag(
            20, 8, mode=mode, padding_idx=padding, max_norm=2.0, include_last_offset=last
        )
    )
    dense = copy.deepcopy(model)
    post_training_sparse_quantize(model, DataNormSparsifier, sparsify_first, sparsity_level=0.5)
    (table,) = read_weights(model)
    dense[0].max_norm = None
    dense[0].weight.data = table.dequantize()
    index = torch.tensor([1, 3, 5, 3, 3, 7, 9, 11])
    offsets = torch.tensor([0, 2, 2, 5] + ([8] if last else []))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model[0](index, offsets), dense[0](index, offsets), **close)
    bags = index.view(4, 2).expand(4, 2)
    torch.testing.assert_close(model(bags), dense(bags), **close)
    if mode == "sum":
        weights = torch.rand(8)
        torch.testing.assert_close(
            model[0](index, offsets, per_sample_weights=weights),
            dense[0](index, offsets, per_sample_weights=weights),
            **close,
        )


def test_max_norm_is_what_lookups_saw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0))
    index = torch.arange(10)
    expected = copy.deepcopy(model)(index)
    post_training_sparse_quantize(model, DataNormSparsifier, sparsity_level=0.0)
    torch.testing.assert_close(model(index), expected, rtol=0, atol=0.01)
    assert model[0].max_norm == 1.0


def test_a_bag_of_maxima_is_refused_unchanged():
    from fx_sparsity.quantization import BackendError

    model = nn.Sequential(nn.EmbeddingBag(10, 8, mode="max"))
    with pytest.raises(BackendError, match="0: expected an EmbeddingBag of mode 'sum' or 'mean'"):
        post_training_sparse_quantize(model, DataNormSparsifier)
    assert type(model[0]) is nn.EmbeddingBag


def test_a_subclass_with_a_forward_of_its_own_is_refused_unchanged():
    from fx_sparsity.quantization import BackendError

    class Scaled(nn.Embedding):
        def forward(self, index):
            return super().forward(index) * 8

    model = nn.Sequential(Scaled(10, 8))
    with pytest.raises(BackendError, match="0: expected torch's own forward, found Scaled.forward"):
        post_training_sparse_quantize(model, DataNormSparsifier)
    assert type(model[0]) is Scaled
