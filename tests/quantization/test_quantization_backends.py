"""What backends make of models as people have them: fused, wrapped, in training mode, odd."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.ao import quantization as tq
from torch.ao.quantization import quantize_fx
from torch.nn import functional as F
from torch.nn.utils import prune
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
from torchao.quantization.pt2e.observer import PlaceholderObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
from torchao.quantization.quant_primitives import MappingType

import fx_sparsity as fxs
from fx_sparsity.graph.calls import operator_name
from fx_sparsity.quantization import (
    BACKENDS,
    BackendError,
    get_backend,
    pt2e,
    sparsify_and_quantize,
)
from fx_sparsity.quantization.observers import EMBEDDING_SPEC
from fx_sparsity.quantization.torch_ao.eager import default_qconfigs
from fx_sparsity.quantization.torch_ao.embeddings import EmbeddingObserver, embedding_qconfig
from fx_sparsity.verification import read_weights
from tests.sparsifier.test_base import assert_unchanged, snapshot

pytestmark = pytest.mark.filterwarnings("ignore")
HALF = fxs.SparsityMapping().set_global("unstructured 50%")
POST_TRAINING = ("sparsify_first", "quantize_first", "interleaved")


def flow(model, inputs, order, backend, **kwargs):
    sparsifier = fxs.WeightNormSparsifier()
    return sparsify_and_quantize(
        model, sparsifier, inputs, order=order, backend=backend, mapping=HALF, **kwargs
    )


def quantize(model, inputs, backend, config=None):
    weights = fxs.find_weights(model, inputs)
    return get_backend(backend).quantize(model, inputs, weights, config=config)


def train(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


ROWS = (torch.randn(4, 16, generator=torch.Generator().manual_seed(0)),)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.attend(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first"])
def test_fx_does_not_mean_what_it_cannot_open(order):
    _, verification = flow(Attention().eval(), (torch.randn(2, 3, 16),), order, "fx")
    verification.raise_if_lost()
    assert {row.fqn for row in verification if row.meant} == {"head.weight"}
    inside = next(row for row in verification if row.fqn == "attend.out_proj.weight")
    assert not inside.quantized


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.fc, self.relu2 = nn.Linear(8, 8), nn.ReLU()

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.relu2(self.fc(x))


IMAGES = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),)


def fused():
    torch.manual_seed(0)
    return tq.fuse_modules(Fused().eval(), [["conv", "bn", "relu"], ["fc", "relu2"]])


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("order", POST_TRAINING)
def test_eager_takes_modules_that_are_fused_already(order, dynamic):
    model = fused()
    config = default_qconfigs(dynamic=dynamic)
    quantized, verification = flow(model, IMAGES, order, "eager", config=config)
    verification.raise_if_lost()
    codes = {row.fqn for row in verification if row.quantized and row.meant}
    assert codes == {"fc.0.weight"} if dynamic else {"fc.0.weight", "conv.0.weight"}
    alone = quantize(model, IMAGES, "eager", config).model
    torch.testing.assert_close(alone(*IMAGES), model(*IMAGES), rtol=0.1, atol=0.1)
    assert torch.isfinite(quantized(*IMAGES)).all()


@pytest.mark.parametrize("backend", ["eager", "fx"])
def test_training_modules_that_are_fused_already(backend):
    def step(model):
        model(*IMAGES).square().mean().backward()

    _, verification = flow(fused(), IMAGES, "qat", backend, calibrate=step)
    verification.raise_if_lost()
    assert {row.fqn for row in verification if row.quantized and row.meant} == {
        "fc.0.weight",
        "conv.0.weight",
    }


@pytest.mark.parametrize("backend", ["eager", "fx"])
def test_modules_fused_for_training_are_named(backend):
    model = tq.fuse_modules_qat(Fused().train(), [["conv", "bn", "relu"]]).eval()
    with pytest.raises(BackendError, match=r"conv: .*ConvBnReLU2d"):
        flow(model, IMAGES, "qat", backend, calibrate=lambda prepared: None)


def test_fx_does_not_mean_what_was_fused_for_training_and_is_not_trained():
    model = tq.fuse_modules_qat(Fused().train(), [["conv", "bn", "relu"]]).eval()
    _, verification = flow(model, IMAGES, "sparsify_first", "fx")
    verification.raise_if_lost()
    assert {row.fqn: row.meant for row in verification} == {
        "conv.0.weight": False,
        "fc.weight": True,
    }


@pytest.mark.parametrize("order", POST_TRAINING)
def test_a_linear_that_is_the_model_itself(order):
    torch.manual_seed(0)
    quantized, verification = flow(nn.Linear(16, 8).eval(), ROWS, order, "eager")
    verification.raise_if_lost()
    assert verification[0].quantized
    assert isinstance(quantized, torch.ao.nn.quantized.dynamic.Linear)


class Recurrent(nn.Module):
    """Reads a sequence."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.inner = kind(8, 12, **settings)

    def forward(self, x):
        found = self.inner(x)
        return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (nn.LSTM, {"num_layers": 2}),
        (nn.LSTM, {"bidirectional": True, "bias": True}),
        (nn.GRU, {}),
        (nn.LSTMCell, {}),
        (nn.GRUCell, {}),
        (nn.RNNCell, {}),
    ],
)
def test_recurrent_weights_are_masked_in_both_orders(kind, settings, order):
    torch.manual_seed(0)
    cell = issubclass(kind, nn.RNNCellBase)
    model, inputs = (
        Recurrent(kind, **settings).eval(),
        (torch.randn(*([5] if cell else [3, 5]), 8),),
    )
    config = {kind: tq.default_dynamic_qconfig}
    quantized, verification = flow(model, inputs, order, "eager", config=config)
    assert {row.fqn for row in verification} == {
        name for name, parameter in model.named_parameters() if parameter.ndim > 1
    }
    assert {row.dtype for row in verification.raise_if_lost()} == {"qint8"}
    # Independent of the reader: torch's own way to unpack.
    for attribute, weight in quantized.inner.get_weight().items():
        assert int((weight.dequantize() == 0).sum()) >= weight.numel() // 2, attribute
    sparse = copy.deepcopy(model)
    for attribute, weight in quantized.inner.get_weight().items():
        getattr(sparse.inner, attribute).data = weight.dequantize()
    assert (quantized(*inputs) - sparse(*inputs)).abs().max() < 0.05
    fqn = "inner.weight_hh" if cell else "inner.weight_hh_l0"
    stored = next(weight for weight in read_weights(quantized) if weight.fqn == fqn)
    codes = stored.data.clone()
    codes[tuple((~verification.record[fqn].keep).nonzero()[0])] = 1
    stored.write(codes)
    assert [row.fqn for row in fxs.verify(quantized, verification.record) if row.faults] == [fqn]


@pytest.mark.parametrize("backend", ["eager", "fx"])
@pytest.mark.parametrize("dim", [6, 7])
def test_4_bit_tables_of_odd_width_are_refused(dim, backend):
    """Torch packs their rows across bytes, and looks up others' codes."""
    torch.manual_seed(0)
    observer = EmbeddingObserver.with_args(dtype=torch.quint4x2, **EMBEDDING_SPEC)
    qconfig = embedding_qconfig._replace(weight=observer)
    config = {nn.Embedding: qconfig}
    if backend == "fx":
        config = tq.QConfigMapping().set_object_type(nn.Embedding, qconfig)
    model, inputs = nn.Sequential(nn.Embedding(40, dim)), (torch.arange(40),)
    if dim % 2:
        with pytest.raises(BackendError, match="0: torch packs rows of 7 4-bit codes wrongly"):
            flow(model, inputs, "sparsify_first", backend, config=config)
        return
    quantized, verification = flow(model, inputs, "sparsify_first", backend, config=config)
    (row,) = verification.raise_if_lost()
    assert (row.dtype, row.elements, row.wanted) == ("quint4x2", 40 * dim, 20 * dim)
    near = quantized(*inputs).abs() < 5e-3  # scales are in half precision there
    assert int(near.sum()) == row.zeros


@pytest.mark.parametrize("dim", [16, 6])
def test_4_bit_embeddings_are_read_by_nibbles(dim):
    torch.manual_seed(0)
    config = {nn.Embedding: tq.float_qparams_weight_only_qconfig_4bit}
    model, inputs = nn.Sequential(nn.Embedding(40, dim)), (torch.arange(40),)
    quantized = quantize(model, inputs, "eager", config).model
    (stored,) = read_weights(quantized)
    assert (stored.dtype, stored.code_range) == ("quint4x2", (0, 15))
    # Independent of the reader: what torch's lookup returns.
    torch.testing.assert_close(stored.dequantize(), quantized(*inputs), rtol=1e-2, atol=1e-2)
    codes = stored.data.flip(0).clone()
    stored.write(codes)
    assert torch.equal(read_weights(quantized)[0].data, codes)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 16)
        with torch.no_grad():
            self.w[:4] = 0

    def forward(self, x):
        return F.linear(self.inner(x), self.w)


def test_functional_linears_that_torch_converted_itself():
    prepared = quantize_fx.prepare_fx(
        Functional().eval(), tq.get_default_qconfig_mapping("x86"), ROWS
    )
    prepared(*ROWS)
    converted = quantize_fx.convert_fx(prepared)
    rows = {row.fqn: row for row in fxs.verify(converted)}
    assert set(rows) == {"inner.weight", "_packed_weight_0"}
    assert rows["_packed_weight_0"].sparsity == 0.5


@pytest.mark.parametrize("root", [True, False])
def test_float16_weights_are_float(root):
    model = mlp()[0] if root else mlp()
    quantized = tq.quantize_dynamic(nn.Sequential(model), {nn.Linear}, dtype=torch.float16)
    stored = read_weights(quantized)
    assert {(w.dtype, w.quantized) for w in stored} == {("float16", False)}
    original = model.weight if root else model[0].weight
    assert torch.equal(stored[0].data.float(), original.detach().half().float())
    stored[0].write(torch.zeros_like(stored[0].data))
    assert read_weights(quantized)[0].zeros().all()


@pytest.mark.parametrize("backend", ["eager", "fx"])
@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first"])
def test_float16_flows(order, backend):
    config = {
        "eager": {nn.Linear: tq.float16_dynamic_qconfig},
        "fx": tq.QConfigMapping().set_global(tq.float16_dynamic_qconfig),
    }
    _, verification = flow(mlp(), ROWS, order, backend, config=config[backend])
    verification.raise_if_lost()
    assert {(row.dtype, row.meant) for row in verification} == {("float16", False)}


@pytest.mark.parametrize("config", ["int8", {"0": 1}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_configurations_of_another_kind(backend, config):
    with pytest.raises(BackendError, match=r"config.*expected .*, found"):
        flow(mlp(), ROWS, "sparsify_first", backend, config=config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"0": tq.per_channel_dynamic_qconfig}, "module classes as keys, found '0'"),
        ({nn.Linear: torch.qint8}, "a qconfig or None for Linear, found torch.qint8"),
        ({int: tq.per_channel_dynamic_qconfig}, "module classes as keys, found <class 'int'>"),
    ],
)
def test_eager_names_what_is_wrong_with_a_mapping(config, message):
    with pytest.raises(BackendError, match=message):
        flow(mlp(), ROWS, "sparsify_first", "eager", config=config)


class Special(nn.Linear):
    pass


@pytest.mark.parametrize(
    "qconfig", [tq.per_channel_dynamic_qconfig, tq.get_default_qconfig("x86")], ids=["dyn", "sta"]
)
def test_eager_names_classes_that_torch_cannot_swap(qconfig):
    model = nn.Sequential(Special(16, 8)).eval()
    with pytest.raises(BackendError, match=r"0: torch has no quantized class .* Special"):
        flow(model, ROWS, "sparsify_first", "eager", config={Special: qconfig})


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_a_pruning_hook_computes(backend):
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.3)
    with pytest.raises(BackendError, match=r"0\.weight.*prune\.remove.*take_over_pruned"):
        flow(model, ROWS, "sparsify_first", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64(backend):
    model, inputs = mlp().double(), (ROWS[0].double(),)
    before = snapshot(model)
    with pytest.raises(BackendError, match=r"0\.weight.*float64"):
        flow(model, inputs, "sparsify_first", backend)
    assert_unchanged(model, before)


@pytest.mark.parametrize("backend", ["eager", "fx", "pt2e"])
@pytest.mark.parametrize("step", ["prepare", "convert"])
def test_torchs_refusals_keep_its_words(step, backend, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("only on Tuesdays")

    names = {
        "eager": (tq, "prepare", "convert"),
        "fx": (quantize_fx, "prepare_fx", "convert_fx"),
        "pt2e": (pt2e, "prepare_pt2e", "convert_pt2e"),
    }
    module, *steps = names[backend]
    monkeypatch.setattr(module, steps[step == "convert"], refuse)
    config = default_qconfigs(dynamic=False) if backend == "eager" else None
    with pytest.raises(BackendError, match=r"AssertionError: only on Tuesdays"):
        flow(mlp(), ROWS, "sparsify_first", backend, config=config)


@pytest.mark.parametrize("backend", ["eager", "fx"])
def test_observers_that_fail_on_the_example(backend, monkeypatch):
    def refuse(self, values):
        raise RuntimeError("range is not finite")

    monkeypatch.setattr(tq.HistogramObserver, "forward", refuse)
    config = default_qconfigs(dynamic=False) if backend == "eager" else None
    with pytest.raises(BackendError, match="calibration on example_inputs.*range is not finite"):
        flow(mlp(), ROWS, "sparsify_first", backend, config=config)


class Noisy(nn.Module):
    """Dropout and batch norm, which differ between training and inference."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.drop = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.b = nn.Linear(16, 8)
        with torch.no_grad():
            self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.b(self.drop(self.bn(self.a(x))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_in_training_mode_is_quantized_for_inference(backend):
    torch.manual_seed(0)
    model = Noisy().train()
    expected = copy.deepcopy(model).eval()(*ROWS)
    before, state = snapshot(model), torch.get_rng_state()
    quantized = quantize(model, ROWS, backend).model
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert_unchanged(model, before)
    assert not quantized.training
    assert torch.equal(quantized(*ROWS), quantized(*ROWS))
    torch.testing.assert_close(quantized(*ROWS), expected, rtol=0.1, atol=0.1)


SLOW_PT2E = [pytest.param(b, marks=pytest.mark.exhaustive) if b == "pt2e" else b for b in BACKENDS]


@pytest.mark.parametrize("backend", SLOW_PT2E)
def test_what_was_trained_comes_out_for_inference(backend):
    torch.manual_seed(0)
    model = Noisy().eval()
    active = []

    def calibrate(prepared):
        train(prepared)
        active.append(not torch.equal(prepared(*ROWS), prepared(*ROWS)))

    quantized, verification = flow(model, ROWS, "qat", backend, calibrate=calibrate)
    verification.raise_if_lost()
    assert active == [True]
    assert not quantized.training
    assert torch.equal(quantized(*ROWS), quantized(*ROWS))


@pytest.mark.parametrize("backend", SLOW_PT2E)
def test_random_state_is_left_alone(backend):
    model = Noisy().eval()
    weights = fxs.find_weights(model, ROWS)
    chosen = get_backend(backend)
    state = torch.get_rng_state()
    prepared = chosen.prepare(model, ROWS, weights, qat=True)
    assert torch.equal(torch.get_rng_state(), state)
    if chosen.observes:
        prepared.model(*ROWS)
    torch.set_rng_state(state)
    chosen.convert(prepared, ROWS)
    assert torch.equal(torch.get_rng_state(), state)
    chosen.quantize(model, ROWS, weights)
    assert torch.equal(torch.get_rng_state(), state)


class Stubbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = tq.QuantStub(), tq.DeQuantStub()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)
        self.plus = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        x = self.up(self.enter(x))
        return self.leave(self.plus.add(x, self.down(x)))


@pytest.mark.parametrize("order", [*POST_TRAINING, "qat"])
def test_stubs_of_the_models_own(order):
    torch.manual_seed(0)
    model = Stubbed().eval()
    config = default_qconfigs(dynamic=False, qat=order == "qat")
    calibrate = train if order == "qat" else None
    quantized, verification = flow(model, ROWS, order, "eager", config=config, calibrate=calibrate)
    verification.raise_if_lost()
    assert all(row.quantized for row in verification)
    assert isinstance(quantized.enter, torch.ao.nn.quantized.Quantize)
    assert quantized(*ROWS).dtype == torch.float32
    alone = quantize(model, ROWS, "eager", default_qconfigs(dynamic=False)).model
    torch.testing.assert_close(alone(*ROWS), model(*ROWS), rtol=0.1, atol=0.1)


def test_stubs_keep_what_the_configuration_says():
    own = tq.get_default_qconfig("onednn")
    config = {nn.Linear: tq.get_default_qconfig("x86"), tq.QuantStub: own}
    model = Stubbed().eval()
    weights = fxs.find_weights(model, ROWS)
    prepared = get_backend("eager").prepare(model, ROWS, weights, config=config).model
    # Of the two, x86 is the one whose activations have a reduced range.
    assert not prepared.enter.activation_post_process.reduce_range
    assert prepared.plus.activation_post_process.reduce_range


class WeightsOnly(Quantizer):
    """The weights of linears, observed in one way."""

    def __init__(self, dtype=torch.int8, **spec):
        self.spec = QuantizationSpec(dtype=dtype, **spec)

    def annotate(self, model):
        for node in model.graph.find_nodes(
            op="call_function", target=torch.ops.aten.linear.default
        ):
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map={node.args[1]: self.spec}, _annotated=True
            )
        return model

    def validate(self, model):
        pass


def quantize_weights(**spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    return sparsify_and_quantize(
        model,
        fxs.WeightNormSparsifier(),
        (torch.randn(2, 32),),
        order="sparsify_first",
        backend="pt2e",
        mapping="2:4",
        config=WeightsOnly(**spec),
    )


@pytest.mark.parametrize("granularity", [PerGroup(8), PerAxis(0), PerTensor()])
def test_affine_scales_of_any_granularity_are_read(granularity):
    observer = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=MappingType.ASYMMETRIC,
        target_dtype=torch.int8,
        granularity=granularity,
        eps=1e-6,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    model, verification = quantize_weights(observer_or_fake_quant_ctr=observer)
    verification.raise_if_lost()
    (stored,) = [weight for weight in read_weights(model) if weight.fqn == "0.weight"]
    (node,) = [n for n in model.graph.nodes if operator_name(n) == "dequantize_affine"]
    args = [model.get_buffer(arg.target) if isinstance(arg, fx.Node) else arg for arg in node.args]
    torch.testing.assert_close(stored.dequantize(), node.target(*args, **node.kwargs))
    broken = stored.data.clone()
    broken[stored.zeros()] += 1
    stored.write(broken)
    assert not fxs.verify(model, verification.record).ok


def test_scales_that_are_computed_at_run_time_prove_nothing():
    observer = PlaceholderObserver.with_args(is_dynamic=True)
    spec = {"qscheme": torch.per_tensor_affine, "quant_min": -128, "quant_max": 127}
    _, verification = quantize_weights(observer_or_fake_quant_ctr=observer, is_dynamic=True, **spec)
    assert "its scale is computed when the model runs" in verification.rows[0].faults
