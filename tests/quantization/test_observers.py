import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao import quantization as tq
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer.embedding_quantizer import (
    EmbeddingQuantizer as TorchAOEmbeddingQuantizer,
)

import fx_sparsity as fxs
from fx_sparsity.quantization import IgnoreZeros, pt2e, zero_cost
from fx_sparsity.quantization.observers import EMBEDDING_SPEC
from fx_sparsity.quantization.torch_ao.embeddings import (
    EmbeddingObserver,
    FarRowsAloneObserver,
    embedding_qconfig,
    far_rows_alone_qconfig,
)
from fx_sparsity.verification import ZeroNotRepresentableError
from fx_sparsity.verification.graph_reader import read_nodes
from tests.benchmarks import bench_observers

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*", "ignore:.*must run observer.*")
few = settings(max_examples=60, deadline=None)

SPECS = {
    "eager": {"dtype": torch.quint8},
    "pt2e": {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255},
}
OBSERVERS = {
    ("eager", "ours"): EmbeddingObserver,
    ("eager", "far rows alone"): FarRowsAloneObserver,
    ("pt2e", "ours"): pt2e.EmbeddingObserver,
    ("pt2e", "far rows alone"): pt2e.FarRowsAloneObserver,
}


def qparams(observer_class, weight, backend="eager"):
    observer = observer_class(**SPECS[backend], **EMBEDDING_SPEC)
    observer(weight)
    return observer.calculate_qparams()


def errors(weight, scale, zero_point):
    """In float64, of what torch's own quantization returns: squares, by row."""
    codes = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.quint8).int_repr()
    values = (codes.double() - zero_point.double()[:, None]) * scale.double()[:, None]
    return (values - weight.double()).square()


def spans_zero(weight):
    return (weight.amin(1) <= 0) & (weight.amax(1) >= 0)


numbers = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@st.composite
def tables(draw):
    """Rows of all kinds: skewed, clipped, constant, of zeros, far from zero."""
    dim = draw(st.integers(1, 6))
    row = st.lists(numbers, min_size=dim, max_size=dim)
    signs = st.sampled_from([None, 1, -1])
    rows = draw(st.lists(st.tuples(row, signs), min_size=1, max_size=8))
    return torch.tensor([[abs(x) * sign if sign else x for x in row] for row, sign in rows])


@few
@given(weight=tables())
@pytest.mark.parametrize("which", OBSERVERS)
def test_a_row_that_spans_zero_is_off_by_at_most_half_a_stock_step(which, weight):
    scale, zero_point = qparams(OBSERVERS[which], weight, which[0])
    stock_scale, stock_zero_point = qparams(PerChannelMinMaxObserver, weight)
    span = spans_zero(weight)
    whole = span if which[1] == "far rows alone" else torch.ones_like(span)
    assert torch.equal(zero_point[whole], zero_point[whole].round())
    assert zero_point[whole].ge(0).all()
    assert zero_point[whole].le(255).all()
    # Nothing is clipped: half a step, and the rounding of float32.
    assert errors(weight, scale, zero_point)[whole].sqrt().le(0.5002 * scale[whole, None]).all()
    assert scale[span].ge(stock_scale[span] * 0.99999).all()
    assert scale[span].le(stock_scale[span] * (1 + 1 / 127) * 1.00001).all()
    if which[1] == "far rows alone":
        assert torch.equal(scale[~span], stock_scale[~span])
        assert torch.equal(zero_point[~span], stock_zero_point[~span])


@few
@given(
    seed=st.integers(0, 2**31),
    dim=st.sampled_from([16, 32, 64, 128]),
    shift=st.floats(-1.5, 1.5),
    magnitude=st.sampled_from([1e-2, 1.0, 1e3]),
    shape=st.sampled_from(["normal", "uniform", "laplace", "clipped", "half zeros"]),
    which=st.sampled_from(sorted(OBSERVERS)),
)
def test_rows_that_span_zero_cost_at_most_five_percent(seed, dim, shift, magnitude, shape, which):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2**17 // dim, dim, generator=generator)
    uniform = (torch.rand(normal.shape, generator=generator) * 2 - 1) * 0.9999
    weight = {
        "normal": normal + shift,
        "uniform": uniform + shift / 2,
        "laplace": -uniform.sign() * torch.log1p(-uniform.abs()) + shift,
        "clipped": normal.clamp(-1, 1),
        "half zeros": torch.where(uniform < 0, 0, normal + shift),
    }[shape] * magnitude
    weight = weight[spans_zero(weight)]
    ours = errors(weight, *qparams(OBSERVERS[which], weight, which[0])).mean().sqrt()
    stock = errors(weight, *qparams(PerChannelMinMaxObserver, weight)).mean().sqrt()
    assert ours <= 1.05 * stock


@few
@given(weight=tables())
def test_the_reported_cost_is_that_of_the_observers(weight):
    cost = zero_cost(weight)
    ours = errors(weight, *qparams(EmbeddingObserver, weight)).mean(1).sqrt()
    stock = errors(weight, *qparams(PerChannelMinMaxObserver, weight)).mean(1).sqrt()
    # Elsewhere the stock observer is exact, and float32 decides.
    inexact = stock > 1e-4 * weight.double().abs().amax(1)
    torch.testing.assert_close(cost[inexact], (ours / stock)[inexact], rtol=1e-2, atol=1e-2)
    assert cost.isfinite().all()


def test_the_cost_tells_which_rows_pay():
    torch.manual_seed(0)
    near, far = torch.randn(200, 64), 3 + 0.1 * torch.randn(200, 64)
    constant, nothing = torch.full((1, 64), -3.0), torch.zeros(1, 64)
    cost = zero_cost(torch.cat([near, far, constant, nothing]))
    assert cost.shape == (402,)
    assert 1 < cost[:200].square().mean().sqrt() < 1.05
    assert cost[200:400].min() > 4
    assert cost[200:400].mean() == pytest.approx(6.9, rel=0.05)
    assert cost[400:].tolist() == [1, 1]


@pytest.mark.parametrize(
    "weight", [torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 2, dtype=torch.long)]
)
def test_the_cost_of_what_is_no_table_is_an_error(weight):
    with pytest.raises(ValueError, match=r"rows x dim, found .*\(3"):
        zero_cost(weight)


@pytest.mark.parametrize("kind", ["ours", "far rows alone"])
def test_both_backends_quantize_embeddings_alike(kind):
    torch.manual_seed(0)
    weight = torch.randn(50, 16) + torch.linspace(0, 5, 50)[:, None]
    eager = qparams(OBSERVERS["eager", kind], weight, "eager")
    for ours, theirs in zip(eager, qparams(OBSERVERS["pt2e", kind], weight, "pt2e"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("qconfig", [embedding_qconfig, far_rows_alone_qconfig])
def test_the_observers_work_inside_torch_prepare_and_convert(qconfig):
    model = nn.Sequential(nn.Embedding(10, 8))
    with torch.no_grad():
        model[0].weight[5:].abs_().add_(3)
    model[0].qconfig = qconfig
    stock = copy.deepcopy(model)
    stock[0].qconfig = tq.float_qparams_weight_only_qconfig
    zero_points = []
    for module in (model, stock):
        tq.convert(tq.prepare(module, inplace=True), inplace=True)
        zero_points.append(module[0].weight().q_per_channel_zero_points())
    ours, theirs = zero_points
    assert torch.equal(ours[:5], ours[:5].round())
    assert torch.equal(ours[5:], theirs[5:]) == (qconfig is far_rows_alone_qconfig)


def test_far_rows_are_left_alone_by_pt2e():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8))
    inputs = (torch.arange(20),)
    with torch.no_grad():
        model[0].weight[10:].abs_().add_(3)
        keep = model[0].weight.abs() > 0.5
    weights = fxs.find_weights(model, inputs)
    ours = pt2e.default_quantizer(embedding_observer=pt2e.FarRowsAloneObserver)
    backend = pt2e.PT2EBackend()

    sparse = copy.deepcopy(model)
    with torch.no_grad():
        sparse[0].weight.mul_(keep)
    quantized, stock = (
        backend.quantize(sparse, inputs, weights, config=config).model
        for config in (ours, TorchAOEmbeddingQuantizer())
    )
    (stored,) = read_nodes(quantized)
    assert stored.zeros()[~keep].all()
    near, far = slice(0, 10), slice(10, 20)
    assert torch.equal(quantized(*inputs)[far], stock(*inputs)[far])
    error, stock_error = (
        (result(*inputs) - sparse[0].weight)[near].double().square().mean().sqrt()
        for result in (quantized, stock)
    )
    assert error < 0.6 * stock_error

    (stored,) = read_nodes(backend.quantize(model, inputs, weights, config=ours).model)
    with pytest.raises(ZeroNotRepresentableError, match=r"^0\.weight .* found 10 others"):
        stored.set_zero(keep)


def test_far_rows_are_left_alone_in_training():
    model = nn.Sequential(nn.Embedding(20, 8))
    inputs = (torch.arange(20),)
    with torch.no_grad():
        model[0].weight[10:].abs_().add_(3)
    prepared = pt2e.PT2EBackend().prepare(
        model,
        inputs,
        fxs.find_weights(model, inputs),
        config=pt2e.EmbeddingQuantizer(observer=pt2e.FarRowsAloneObserver, qat=True),
        qat=True,
    )
    weight = model[0].weight.detach()
    scale, _ = qparams(PerChannelMinMaxObserver, weight)
    step = (prepared.model(*inputs) - weight).abs().amax(1) / scale
    assert step[10:].le(0.501).all()
    assert step[:10].le(0.501 * (1 + 1 / 127)).all()


class KeptMinMax(IgnoreZeros, MinMaxObserver):
    pass


class KeptHistogram(IgnoreZeros, HistogramObserver):
    pass


per_tensor = st.sampled_from(
    [(torch.qint8, torch.per_tensor_symmetric), (torch.quint8, torch.per_tensor_affine)]
)


def observed(observer_class, spec, weights):
    observer = observer_class(dtype=spec[0], qscheme=spec[1])
    for weight in weights:
        assert observer(weight) is weight
    scale, zero_point = observer.calculate_qparams()
    return scale.item(), zero_point.item()


@few
@given(
    weights=st.lists(tables(), min_size=1, max_size=2).filter(lambda w: any(t.any() for t in w)),
    spec=per_tensor,
)
def test_min_max_ranges_do_not_depend_on_zeros(weights, spec):
    assert observed(KeptMinMax, spec, weights) == observed(MinMaxObserver, spec, weights)


@settings(max_examples=10, deadline=None)  # the histogram's search is slow
@given(weight=tables(), spec=per_tensor)
def test_zero_stays_a_code_where_zeros_do_not_count(weight, spec):
    scale, zero_point = observed(KeptHistogram, spec, [weight])
    assert torch.iinfo(spec[0]).min <= zero_point <= torch.iinfo(spec[0]).max
    zeros = torch.quantize_per_tensor(torch.zeros(1), scale, zero_point, spec[0])
    assert zeros.dequantize().item() == 0


def test_a_histogram_clips_less_where_zeros_do_not_count():
    torch.manual_seed(0)
    weight = torch.randn(300, 300).abs()
    weight[weight < 1.645] = 0
    spec = (torch.quint8, torch.per_tensor_affine)
    kept = weight[weight != 0]
    assert observed(KeptHistogram, spec, [weight]) == observed(HistogramObserver, spec, [kept])
    error = []
    for kind in (KeptHistogram, HistogramObserver):
        codes = torch.quantize_per_tensor(kept, *observed(kind, spec, [weight]), spec[0])
        error.append((codes.dequantize() - kept).double().square().mean().sqrt())
    assert error[0] < 0.9 * error[1]


def test_ignoring_zeros_is_refused_where_it_would_lose_the_channels():
    class PerChannel(IgnoreZeros, PerChannelMinMaxObserver):
        pass

    with pytest.raises(TypeError, match="PerChannel: expected a per-tensor scheme, found"):
        PerChannel(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)(torch.ones(2, 2))


def test_the_benchmark_runs(capsys):
    text = bench_observers.main(["--small"])
    assert capsys.readouterr().out == text + "\n"
    assert "N(3, 0.1)" in text
    assert "Laplace" in text
