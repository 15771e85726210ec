"""Loading into modules that keep their weights compressed."""

import copy

import pytest
import torch
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
from safetensors.torch import save_file
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.kernels import SparseLinear
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.packed_module import PackedModule
from fx_sparsity.quantization.backend import get_backend
from fx_sparsity.quantization.codes import Codes, hold_codes
from fx_sparsity.storage import CompressedFile, FileFormatError, parameters_on_meta
from fx_sparsity.storage.described_state import flatten
from fx_sparsity.verification.gate import read_weights


def loaded(report):
    """FQN -> what holds the weight now."""
    return {row.fqn: row.module or f"dense: {row.reason}" for row in report.rows}


class Ranker(nn.Module):
    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(64, 32, padding_idx=3)
        self.items = nn.EmbeddingBag(64, 32, mode="sum")
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
        self.blocks = nn.Linear(32, 64)
        self.dense = nn.Linear(64, 64)
        self.hooked = nn.Linear(64, 64)
        self.tied = nn.Linear(32, 64)
        self.tied.weight = self.users.weight

    def forward(self, x):
        h = self.mlp(self.users(x).sum(1) + self.items(x))
        return self.hooked(self.dense(self.blocks(h))) + self.tied(h)


def sparse_ranker():
    model = Ranker().eval()
    mapping = (
        fxs.SparsityMapping()
        .set_module_name("mlp.0", "unstructured 70%")
        .set_module_name("mlp.2", "2:4")
        .set_module_name("blocks", "block:16x1 50%")
        .set_module_name("hooked", "unstructured 70%")
        .set_module_name("items", "rows 50%")
        .set_module_name("users", "rows 50%")
    )
    sparsifier = fxs.WeightNormSparsifier()
    x = torch.randint(64, (5, 4))
    fxs.prepare(model, sparsifier, (x,), mapping)
    sparsifier.step()
    model, _ = fxs.squash(model, sparsifier)
    return model, x


@pytest.mark.parametrize("meta", [False, True])
def test_sparse_weights_stay_compressed(tmp_path, meta):
    model, x = sparse_ranker()
    fxs.save(model, tmp_path / "f")
    if meta:
        with parameters_on_meta():
            other = Ranker().eval()
    else:
        other = Ranker().eval()
    other.hooked.register_forward_hook(lambda *_: None)
    report = loaded(fxs.load_sparse(tmp_path / "f", other, check=True))
    assert report == {
        "users.weight": "dense: tied to another weight",
        "items.weight": "RowPrunedEmbeddingBag",
        "mlp.0.weight": "SparseLinear",
        "mlp.2.weight": "SparseLinear",
        "blocks.weight": "SparseLinear",
        "hooked.weight": "dense: it has hooks",
    }
    assert isinstance(other.items, RowPrunedEmbeddingBag)
    assert isinstance(other.mlp[0], SparseLinear)
    assert torch.equal(other.mlp[2].dense_weight(), model.mlp[2].weight)
    assert other.tied.weight is other.users.weight
    assert not any(p.is_meta for p in other.parameters())
    torch.testing.assert_close(other(x), model(x))


def test_an_embedding_alone(tmp_path):
    model = nn.Sequential(nn.Embedding(64, 32, padding_idx=3))
    with torch.no_grad():
        model[0].weight[::2] = 0
    fxs.save(model, tmp_path / "f")
    other = nn.Sequential(nn.Embedding(64, 32, padding_idx=3))
    assert loaded(fxs.load_sparse(tmp_path / "f", other)) == {"0.weight": "RowPrunedEmbedding"}
    assert isinstance(other[0], RowPrunedEmbedding)
    x = torch.arange(64)
    assert torch.equal(other(x), model(x))


def test_what_does_not_fit_changes_nothing(tmp_path):
    model, _ = sparse_ranker()
    state = model.state_dict()
    del state["dense.bias"]
    fxs.save(state, tmp_path / "f")
    other = Ranker()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="dense.bias: not in the file"):
        fxs.load_sparse(tmp_path / "f", other)
    after = other.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_tie_of_the_file_alone_is_packed_twice(tmp_path):
    weight = torch.randn(32, 32) * torch.eye(32)
    fxs.save({"0.weight": weight, "1.weight": weight}, tmp_path / "f")
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    report = loaded(fxs.load_sparse(tmp_path / "f", model))
    assert report == {"0.weight": "SparseLinear", "1.weight": "SparseLinear"}
    assert all(torch.equal(layer.dense_weight(), weight) for layer in model)


def test_a_module_in_two_places_is_packed_once(tmp_path):
    layer = nn.Linear(32, 32)
    layer.weight.data[torch.rand(32, 32) < 0.6] = 0
    fxs.save(nn.Sequential(layer, layer), tmp_path / "f")
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, layer)
    assert loaded(fxs.load_sparse(tmp_path / "f", model)) == {"0.weight": "SparseLinear"}
    assert model[0] is model[1]


def test_a_module_that_was_saved_as_two_holds_the_last(tmp_path):
    first, last = (torch.randn(32, 32) * (torch.rand(32, 32) < 0.4) for _ in range(2))
    fxs.save({"0.weight": first, "1.weight": last}, tmp_path / "f")
    layer = nn.Linear(32, 32, bias=False)
    model = nn.Sequential(layer, layer)
    assert loaded(fxs.load_sparse(tmp_path / "f", model)) == {"0.weight": "SparseLinear"}
    assert torch.equal(model[1].dense_weight(), last)


def test_unlower_gives_back_a_plain_model(tmp_path):
    model, x = sparse_ranker()
    fxs.save(model, tmp_path / "f")
    other = Ranker().eval()
    fxs.load_sparse(tmp_path / "f", other)
    other = fxs.unlower(other)
    assert [type(module) for module in other.modules()] == [type(m) for m in model.modules()]
    found = other.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(other(x), model(x))


# -- quantized models ----------------------------------------------------------------------------


class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(64, 32, padding_idx=3)
        self.items = nn.EmbeddingBag(64, 32, mode="mean")
        self.best = nn.EmbeddingBag(64, 32, mode="max")  # keeps its module, which reads codes
        self.fc = nn.Linear(32, 64)
        self.act = nn.ReLU()
        self.out = nn.Linear(64, 32, bias=False)
        self.blocks = nn.Linear(32, 64)
        self.head = nn.Linear(64, 32)

    def forward(self, x):
        h = self.out(self.act(self.fc(self.users(x).sum(1) + self.items(x) + self.best(x))))
        return self.head(self.blocks(h))


BASKETS = torch.randint(64, (5, 4), generator=torch.Generator().manual_seed(0))
MAPPING = (
    fxs.SparsityMapping()
    .set_module_name("fc", "unstructured 70%")
    .set_module_name("out", "2:4")
    .set_module_name("blocks", "block:16x1 50%")
    .set_object_type(nn.Embedding, "rows 50%")
    .set_object_type(nn.EmbeddingBag, "rows 50%")
)
LINEARS = {"fc.weight": "bitmask", "out.weight": "nm", "blocks.weight": "block"}
TABLES = {
    "users.weight": "RowPrunedEmbedding",
    "items.weight": "RowPrunedEmbeddingBag",
    "best.weight": "RowPrunedEmbeddingBag",
}


def of_torchao(name):
    import torchao.quantization as ao

    return {nn.Linear: getattr(ao, name)()}


def fx_dynamic():
    from torch.ao.quantization import default_dynamic_qconfig

    from fx_sparsity.quantization.torch_ao.fx import default_qconfig_mapping

    return default_qconfig_mapping(dynamic=True).set_global(default_dynamic_qconfig)


FLOWS = {
    "eager": ("eager", lambda: None),
    "fx": ("fx", fx_dynamic),
    "torchao dynamic": ("torchao", lambda: of_torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao weight-only": ("torchao", lambda: of_torchao("Int8WeightOnlyConfig")),
}


def quantized_scorer(flow, seed=0):
    """A quantized model, and the record of its masks."""
    torch.manual_seed(seed)
    backend, config = FLOWS[flow]
    sparsifier = fxs.WeightNormSparsifier()
    model = Scorer().eval()
    fxs.prepare(model, sparsifier, (BASKETS,), MAPPING)
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    weights = fxs.find_weights(model, (BASKETS,))
    made = get_backend(backend).quantize(model, (BASKETS,), weights, config=config())
    return made.model, record


def assert_as_good(found, expected):
    """Layer by layer equal but for the rounding of float32: sums may be taken in another order.

    What the whole model gives may be one step of an activation's 8 bits off, where such a
    difference meets the edge between two codes.
    """
    step = torch.finfo(torch.float32).eps
    for name in (*LINEARS, *TABLES):
        here, there = (m.get_submodule(name.removesuffix(".weight")) for m in (found, expected))
        inputs = BASKETS if name in TABLES else torch.randn(5, here.in_features)
        torch.testing.assert_close(here(inputs), there(inputs), rtol=16 * step, atol=16 * step)
    outputs = expected(BASKETS)
    coarse = float(outputs.abs().max()) / 127
    torch.testing.assert_close(found(BASKETS), outputs, rtol=0, atol=coarse)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flow", FLOWS)
@torch.no_grad()
def test_quantized_weights_stay_compressed(tmp_path, flow):
    model, record = quantized_scorer(flow)
    fxs.save(model, tmp_path / "f")
    dense, other = (quantized_scorer(flow, seed=1)[0] for _ in range(2))
    fxs.load(tmp_path / "f", dense)
    report = loaded(fxs.load_sparse(tmp_path / "f", other, check=True))
    assert report == dict.fromkeys(LINEARS, "SparseLinear") | TABLES
    packings = {name: other.get_submodule(name[:-7]).packing for name in LINEARS}
    assert packings == LINEARS
    assert_as_good(other, dense)
    fxs.verify(other, record).raise_if_lost()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flow", FLOWS)
@torch.no_grad()
def test_unlower_gives_back_a_quantized_model(tmp_path, flow):
    model, _ = quantized_scorer(flow)
    assert flow != "fx" or type(model.fc) is nniqd.LinearReLU
    fxs.save(model, tmp_path / "f")
    other, _ = quantized_scorer(flow, seed=1)
    fxs.load_sparse(tmp_path / "f", other)
    other = fxs.unlower(other)
    assert not any(isinstance(module, PackedModule) for module in other.modules())
    found = {weight.fqn: weight for weight in read_weights(other)}
    for weight in read_weights(model):
        back = found[weight.fqn]
        assert torch.equal(back.dequantize(), weight.dequantize())
        if weight.fqn not in TABLES:  # codes of tables come back as values
            assert torch.equal(back.data, weight.data)
    for path in ("fc", "out", "blocks", "head"):
        assert type(other.get_submodule(path)) is type(model.get_submodule(path))
    assert_as_good(other, model)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_tables_lose_rows_whose_codes_are_stored_dense(tmp_path):
    def made():
        return fxs.sparsify_and_quantize(
            *(Scorer().eval(), fxs.WeightNormSparsifier(), (BASKETS,)),
            order="quantize_first",
            backend="eager",
            mapping=MAPPING,
        )[0]

    model, other = made(), made()
    fxs.save(model, tmp_path / "f")
    assert loaded(fxs.load_sparse(tmp_path / "f", other)) == (
        dict.fromkeys(LINEARS, "SparseLinear") | TABLES
    )
    assert_as_good(other, model)


def dynamic_linear(zero_point=0, outputs=32, axis=None):
    """torch.ao's linear layer with a sparse weight."""
    weight = torch.randn(outputs, 32)
    weight[torch.rand(outputs, 32) < 0.6] = 0
    if axis is None:
        codes = torch.quantize_per_tensor(weight, 0.05, zero_point, torch.qint8)
    else:
        scales, points = torch.full((outputs,), 0.05), torch.zeros(outputs, dtype=torch.int64)
        codes = torch.quantize_per_channel(weight, scales.double(), points, axis, torch.qint8)
    layer = nnqd.Linear(32, outputs)
    layer.set_weight_bias(codes, torch.randn(outputs))
    return layer


def static_linear():
    dynamic = dynamic_linear()
    layer = nnq.Linear(32, 32)
    layer.set_weight_bias(dynamic.weight(), dynamic.bias())
    layer.scale, layer.zero_point = 0.5, 7
    return layer


def coded_bag(scale=0.1):
    bag = nn.EmbeddingBag(64, 32, mode="max")
    rows = torch.full((64,), scale), torch.zeros(64)
    codes = torch.quantize_per_channel(torch.rand(64, 32) + 1, *rows, 0, torch.quint8)
    codes = torch._make_per_channel_quantized_tensor(
        codes.int_repr() * (torch.arange(64) % 2).to(torch.uint8).unsqueeze(1), *rows, 0
    )
    hold_codes(bag, Codes(codes, bag.weight))
    return bag


def torchao_table():
    from torchao.quantization import Int8WeightOnlyConfig, PerTensor, quantize_

    table = nn.Embedding(64, 32)
    table.weight[::2] = 0
    quantize_(table, Int8WeightOnlyConfig(granularity=PerTensor()), filter_fn=lambda *_: True)
    return table


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_what_stays_dense_of_a_quantized_model_is_listed(tmp_path):
    def made():
        return nn.ModuleDict(
            {
                "table": torchao_table(),
                "static": static_linear(),
                "shifted": dynamic_linear(zero_point=3),
                "fine": dynamic_linear(),
                "bad": coded_bag(float("inf")),
                "bag": coded_bag(),
            }
        )

    model, other = made(), made()
    fxs.save(model, tmp_path / "f")
    assert loaded(fxs.load_sparse(tmp_path / "f", other)) == {
        "table.weight": "dense: no kernel for a Int8Tensor of int8, per-tensor symmetric",
        "static.weight": "dense: held by a QuantizedLinear",
        "shifted.weight": "dense: zero points other than 0 have no kernel",
        "fine.weight": "SparseLinear",
        "bad.weight": "dense: expected a finite scale and zero point, found others in row 0",
        "bag.weight": "RowPrunedEmbeddingBag",
    }
    assert torch.equal(other["table"].weight.qdata, model["table"].weight.qdata)
    for name in ("static", "shifted"):
        assert torch.equal(other[name].weight().int_repr(), model[name].weight().int_repr())
    assert (other["static"].scale, other["static"].zero_point) == (0.5, 7)
    assert torch.equal(other["bad"]._weight_codes.codes, model["bad"]._weight_codes.codes)


def state_of(model):
    """What a model holds, as it would be written."""
    return flatten(copy.deepcopy(model).state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("there", "message"),
    [
        (lambda: dynamic_linear(outputs=16), r"0/codes: expected int8 \(32, 32\).*\(16, 32\)"),
        (lambda: dynamic_linear(axis=0), r"expected \(qint8 per tensor, tensor\).*along axis 0"),
        (lambda: nn.Linear(32, 32), "1.weight: not in the file"),
    ],
)
@pytest.mark.parametrize("loader", [fxs.load, fxs.load_sparse])
@torch.no_grad()
def test_a_model_that_is_quantized_otherwise_stays_as_it_was(tmp_path, loader, there, message):
    fxs.save(nn.Sequential(dynamic_linear(), dynamic_linear()), tmp_path / "f")
    other = nn.Sequential(dynamic_linear(), there())
    modules, (before, described) = list(other.modules()), state_of(other)
    with pytest.raises(RuntimeError, match=message):
        loader(tmp_path / "f", other)
    assert list(other.modules()) == modules
    after, also_described = state_of(other)
    assert also_described == described
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loader", [fxs.load, fxs.load_sparse])
@torch.no_grad()
def test_plain_tensors_do_not_stand_for_packed_parameters(tmp_path, loader):
    other = nn.Sequential(nn.Linear(32, 32), dynamic_linear())
    modules, (before, _) = list(other.modules()), state_of(other)
    state = dict.fromkeys(other.state_dict(), torch.zeros(32, 32))
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "f")
    with pytest.raises(RuntimeError, match="_packed_params: expected a plain .* found a tuple"):
        loader(tmp_path / "f", other)
    assert list(other.modules()) == modules
    after, _ = state_of(other)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loader", [fxs.load, fxs.load_sparse])
@torch.no_grad()
def test_torchao_tensors_and_plain_ones_do_not_take_each_other(tmp_path, loader):
    for here, there in ((nn.Embedding(64, 32), torchao_table()), (torchao_table(), None)):
        other = nn.Sequential(nn.Linear(4, 4), there or nn.Embedding(64, 32))
        before = other[0].weight.clone()
        fxs.save(nn.Sequential(nn.Linear(4, 4), here), tmp_path / "f")
        with pytest.raises(RuntimeError, match="1.weight: expected .* in the model, found"):
            loader(tmp_path / "f", other)
        assert torch.equal(other[0].weight, before)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_corrupt_file_of_a_quantized_model_changes_nothing(tmp_path):
    path = tmp_path / "f"
    fxs.save(nn.Sequential(dynamic_linear()), path)
    content = bytearray(path.read_bytes())
    name = "0._packed_params._packed_params/0/codes"
    content[CompressedFile(path).file.entries[f"{name}::values"].start] ^= 1
    path.write_bytes(content)
    other = nn.Sequential(dynamic_linear())
    layer, (before, _) = other[0], state_of(other)
    with pytest.raises(FileFormatError, match=f"^{name}: expected checksum"):
        fxs.load_sparse(path, other, check=True)
    assert other[0] is layer
    assert all(torch.equal(state_of(other)[0][name], tensor) for name, tensor in before.items())


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantized_weights_on_the_meta_device_are_refused(tmp_path):
    fxs.save(nn.Sequential(torchao_table()), tmp_path / "f")
    with pytest.raises(RuntimeError, match="0.weight/qdata: on the meta device"):
        fxs.load_sparse(tmp_path / "f", nn.Sequential(torchao_table()).to("meta"))


@torch.no_grad()
def test_a_table_that_would_be_larger_stays_dense(tmp_path):
    model = nn.Sequential(nn.EmbeddingBag(64, 4), nn.Linear(4, 4))
    model[0].weight[:16] = 0  # saves 256 bytes, and the map to the others takes as many
    fxs.save(model, tmp_path / "f")
    other = nn.Sequential(nn.EmbeddingBag(64, 4), nn.Linear(4, 4))
    reason = "not sparse enough: rows takes 1024 bytes, dense 1024"
    assert loaded(fxs.load_sparse(tmp_path / "f", other)) == {"0.weight": f"dense: {reason}"}
    assert fxs.lower(model, policy="always")[1].dense["0.weight"] == reason
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["pt2e", None])
@torch.no_grad()
def test_what_a_graph_reads_itself_is_packed(tmp_path, backend):
    def made(seed):
        torch.manual_seed(seed)
        scorer = Scorer().eval()
        if backend is None:
            sparsifier = fxs.WeightNormSparsifier()
            fxs.prepare(scorer, sparsifier, (BASKETS,), MAPPING)
            sparsifier.step()
            scorer, record = fxs.squash(scorer, sparsifier)
            return torch.export.export(scorer, (BASKETS,)).module(), record
        model, proof = fxs.sparsify_and_quantize(
            *(scorer, fxs.WeightNormSparsifier(), (BASKETS,)),
            order="sparsify_first",
            backend=backend,
            mapping=MAPPING,
        )
        return model, proof.record

    (model, record), (other, _) = made(0), made(1)
    fxs.save(model, tmp_path / "f")
    report = fxs.load_sparse(tmp_path / "f", other)
    assert loaded(report) == dict.fromkeys(LINEARS, "SparseLinear") | TABLES
    fxs.verify(other, record).raise_if_lost()
    torch.testing.assert_close(other(BASKETS), model(BASKETS))
    torch.testing.assert_close(fxs.unlower(other)(BASKETS), model(BASKETS))
