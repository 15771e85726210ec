import copy
import io

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import nn
from torch.ao import quantization as tq

from fx_sparsity import (
    DataNormSparsifier,
    SparsityMapping,
    WeightNormSparsifier,
    find_weights,
    post_training_sparse_quantize,
)
from fx_sparsity.quantization import BackendError, get_backend, sparsify_and_quantize
from fx_sparsity.quantization.torch_ao.embeddings import embedding_qconfig
from fx_sparsity.sparsifier import MaskError
from fx_sparsity.verification import read_weights
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


class Projected(nn.Embedding):
    """A subclass with a signature, tensors, a method and a forward of its own."""

    def __init__(self, rows, *, width):
        super().__init__(rows, 8, padding_idx=2, max_norm=2.0)
        self.projection = nn.Linear(8, width)
        self.register_buffer("factor", torch.tensor(3.0))

    def forward(self, index):
        return self.projection(super().forward(index)) * self.factor

    def attend(self, x):
        return x @ self.weight.t()


class Logged(nn.EmbeddingBag):
    def forward(self, index, offsets=None):
        return super().forward(index, offsets).exp()


class Gathered(nn.Embedding):
    def forward(self, index):
        return self.weight[index]


OWN = {
    "projected": lambda: Projected(20, width=5),
    "gathered": lambda: Gathered(20, 8),
    "max": lambda: nn.EmbeddingBag(20, 8, mode="max"),
    "max, padded": lambda: nn.EmbeddingBag(20, 8, mode="max", padding_idx=3, max_norm=2.0),
    "max, own forward": lambda: Logged(20, 8, mode="max", padding_idx=3),
    "sum, own forward": lambda: Logged(20, 8, mode="sum", scale_grad_by_freq=True),
}
INDEX = torch.tensor([[1, 3, 5, 2], [3, 3, 19, 3], [2, 2, 3, 0]])


def made(kind):
    torch.manual_seed(0)
    return nn.Sequential(OWN[kind]())


def table_of(model):
    (table,) = (weight for weight in read_weights(model) if weight.quantized)
    return table


def with_table(dense, model):
    """The float model, holding what the codes of the quantized one stand for."""
    dense = copy.deepcopy(dense)
    dense[0].weight.data = table_of(model).dequantize()
    return dense


@pytest.mark.parametrize("sparsify_first", [True, False])
@pytest.mark.parametrize("kind", OWN)
def test_what_torch_cannot_compute_keeps_its_module_and_reads_codes(kind, sparsify_first):
    model = made(kind)
    dense, module = copy.deepcopy(model), model[0]
    post_training_sparse_quantize(
        model, DataNormSparsifier, sparsify_first, sparsity_level=0.5, sparse_block_shape=(1, 1)
    )
    assert model[0] is module
    assert isinstance(module, type(dense[0]))
    assert [t.dtype for t in model.state_dict().values() if t.shape == (20, 8)] == [torch.uint8]
    torch.testing.assert_close(model(INDEX), with_table(dense, model)(INDEX))

    # The same table as a plain one, which torch's own module quantizes.
    plain = nn.Sequential(nn.Embedding(20, 8, max_norm=dense[0].max_norm))
    plain[0].weight.data = dense[0].weight.data.clone()
    post_training_sparse_quantize(
        plain, DataNormSparsifier, sparsify_first, sparsity_level=0.5, sparse_block_shape=(1, 1)
    )
    ours, theirs = table_of(model), table_of(plain)
    assert isinstance(plain[0], nnq.Embedding)
    assert ours.fqn == "0.weight"
    assert ours.scheme == theirs.scheme
    for attribute in ("data", "scale", "zero_point"):
        assert torch.equal(getattr(ours, attribute), getattr(theirs, attribute))
    assert ours.zeros().double().mean() >= 0.5
    assert module.weight[ours.zeros()].eq(0).all()


@pytest.mark.parametrize("last", [False, True])
def test_bags_of_maxima_with_offsets(last):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.EmbeddingBag(20, 8, mode="max", padding_idx=3, include_last_offset=last)
    )
    dense = copy.deepcopy(model)
    post_training_sparse_quantize(model, DataNormSparsifier)
    call = (torch.tensor([1, 3, 5, 3, 3, 7, 9]), torch.tensor([0, 2, 2, 5] + [7] * last))
    torch.testing.assert_close(model[0](*call), with_table(dense, model)[0](*call))


@pytest.mark.parametrize("kind", OWN)
def test_modules_that_read_codes_copy_save_load_and_move(kind):
    model = made(kind)
    post_training_sparse_quantize(model, DataNormSparsifier)
    expected, codes = model(INDEX), table_of(model)

    other = copy.deepcopy(model)
    table_of(other).write(torch.zeros_like(codes.data))
    assert torch.equal(model(INDEX), expected)
    assert not torch.equal(other(INDEX), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(INDEX), expected)

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded[0]) is type(model[0])
    assert torch.equal(loaded(INDEX), expected)

    half = copy.deepcopy(model).half()
    assert half[0].weight.dtype == torch.half
    assert torch.equal(half.float()[0].weight, model[0].weight)
    for attribute in ("data", "scale", "zero_point"):
        assert torch.equal(getattr(table_of(half), attribute), getattr(codes, attribute))
    assert model.to("meta")[0].weight.device.type == "meta"


@pytest.mark.parametrize("kind", OWN)
def test_modules_that_read_codes_compile_and_export(kind):
    model = made(kind).eval()
    post_training_sparse_quantize(model, DataNormSparsifier)
    with torch.no_grad():
        expected = model(INDEX)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(INDEX), expected)
    exported = torch.export.export(model, (INDEX,))
    torch.testing.assert_close(exported.module()(INDEX), expected)
    assert [t.dtype for t in exported.state_dict.values() if t.shape == (20, 8)] == [torch.uint8]


def test_methods_tensors_and_hooks_stay():
    torch.manual_seed(0)

    class Tied(nn.Embedding):
        def attend(self, x):
            return x @ self.weight.t()

    class Holder(nn.Embedding):
        def __init__(self, rows, dim):
            super().__init__(rows, dim)
            self._head = nn.Linear(dim, 2)

    hooked = nn.Embedding(20, 8)
    hooked.register_forward_hook(lambda module, args, output: output * 3)
    model = nn.ModuleList([Tied(20, 8), hooked, Projected(20, width=5), Holder(20, 8)])
    projection, head = model[2].projection.weight, model[3]._head
    post_training_sparse_quantize(model, DataNormSparsifier)
    tables = [weight.dequantize() for weight in read_weights(model) if weight.quantized]
    x = torch.randn(3, 8)
    torch.testing.assert_close(model[0].attend(x), x @ tables[0].t())
    torch.testing.assert_close(model[1](INDEX), tables[1][INDEX] * 3)
    assert model[2].projection.weight is projection
    assert model[3]._head is head
    before = [type(module) for module in model]
    post_training_sparse_quantize(model, DataNormSparsifier)
    assert [type(module) for module in model] == before


def test_masks_go_on_what_is_left_in_float():
    model = nn.Sequential(Gathered(20, 8), nn.Linear(8, 8))
    post_training_sparse_quantize(model, DataNormSparsifier)
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    assert [group["tensor_fqn"] for group in sparsifier.groups] == ["1.weight"]
    with pytest.raises(MaskError, match="0.weight: expected a parameter or a buffer, found"):
        WeightNormSparsifier().prepare(model, [{"tensor_fqn": "0.weight"}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_lookups_keep_their_dtype(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=2.0), nn.Linear(8, 4)).to(dtype)
    post_training_sparse_quantize(model, DataNormSparsifier)
    assert model(INDEX).dtype == dtype
    assert torch.equal(model[0].weight, table_of(model).dequantize().to(dtype))


def test_an_outer_and_an_inner_embedding_are_both_quantized():
    class Summed(nn.Embedding):
        def __init__(self):
            super().__init__(20, 8)
            self.kinds = nn.Embedding(2, 8)

        def forward(self, index):
            return super().forward(index) + self.kinds(index % 2)

    torch.manual_seed(0)
    model = Summed()
    assert post_training_sparse_quantize(model, DataNormSparsifier) is model
    outer, inner = (w.dequantize() for w in read_weights(model) if w.quantized)
    assert isinstance(model.kinds, nnq.Embedding)
    torch.testing.assert_close(model(INDEX), outer[INDEX] + inner[INDEX % 2])


def test_a_shared_module_reads_codes_and_a_tied_head_stays_in_float():
    torch.manual_seed(0)
    table, head = Gathered(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = table.weight
    before = head.weight.detach().clone()
    model = nn.ModuleList([table, table, head])
    post_training_sparse_quantize(model, DataNormSparsifier)
    assert model[0] is model[1]
    assert torch.equal(head.weight, before)
    assert [w.fqn for w in read_weights(model) if w.quantized] == ["0.weight", "1.weight"]


def test_weights_that_something_computes():
    model = nn.Sequential(Gathered(20, 8), nn.Embedding(20, 8))
    sparsifier = WeightNormSparsifier(sparsity_level=0.5)
    sparsifier.prepare(model, [{"tensor_fqn": "1.weight"}])
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(BackendError, match="1: its weight is still masked; squash before"):
        post_training_sparse_quantize(model, DataNormSparsifier)
    assert [type(module) for module in model.modules()] == kinds

    model = nn.Sequential(nn.Embedding(20, 8))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(BackendError, match="0: expected a weight that the module holds"):
        post_training_sparse_quantize(model, DataNormSparsifier)

    model = nn.Sequential(nn.Embedding(20, 8, device="meta"))
    with pytest.raises(BackendError, match="0: its weight has no data yet"):
        post_training_sparse_quantize(model, DataNormSparsifier)

    model = nn.Sequential(nn.Embedding(20, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    expected = model[0].weight.detach().clone()
    post_training_sparse_quantize(model, DataNormSparsifier, sparsity_level=0.0)
    assert (table_of(model).dequantize() - expected).abs().max() < 0.02
    assert {name.split(".")[1] for name in model.state_dict()} == {"_weight_codes"}


@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first"])
@pytest.mark.parametrize("kind", OWN)
def test_the_eager_backend_quantizes_them_and_proves_it(kind, order):
    model = made(kind).eval()
    quantized, verification = sparsify_and_quantize(
        model,
        WeightNormSparsifier(),
        (INDEX,),
        order=order,
        backend="eager",
        mapping=SparsityMapping().set_global("2:4"),
    )
    row = next(row for row in verification.raise_if_lost() if row.fqn == "0.weight")
    assert row.quantized
    assert row.meant
    assert row.wanted == 80
    assert row.extra == 0
    assert type(model[0]) is type(OWN[kind]())
    if kind != "projected":  # whose linear is quantized, too
        torch.testing.assert_close(quantized(INDEX), with_table(model, quantized)(INDEX))


def test_the_nearest_class_in_a_config_counts():
    model, inputs = nn.Sequential(Gathered(20, 8)), (INDEX,)
    weights = find_weights(model, inputs)
    backend = get_backend("eager")

    def quantize(**config):
        return backend.quantize(model, inputs, weights, **config)

    default = quantize()
    assert default.meant == {"0.weight"}
    assert table_of(default.model).quantized
    spared = quantize(config={nn.Embedding: embedding_qconfig, Gathered: None})
    assert spared.meant == frozenset()
    assert type(spared.model[0]) is Gathered
    with pytest.raises(BackendError, match="0: expected a qconfig of torch.quint8 for Gathered"):
        quantize(config={nn.Embedding: tq.float_qparams_weight_only_qconfig_4bit})
