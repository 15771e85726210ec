import pytest
import torch
from torch import nn
from torch.ao import quantization as tq
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from fx_sparsity.quantization.embeddings import EmbeddingObserver
from fx_sparsity.quantization.observers import EMBEDDING_SPEC

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")


def quantization_error(observer_class, weight):
    observer = observer_class(dtype=torch.quint8, **EMBEDDING_SPEC)
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    codes = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.quint8)
    return (codes.dequantize() - weight).square().mean().sqrt(), zero_point


def test_rows_that_span_zero_cost_at_most_five_percent():
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        weight = torch.randn(500, 64) * scale
        ours, zero_point = quantization_error(EmbeddingObserver, weight)
        stock, fractional = quantization_error(PerChannelMinMaxObserver, weight)
        assert ours <= 1.05 * stock
        assert torch.equal(zero_point, zero_point.round())
        assert not torch.equal(fractional, fractional.round())


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 8), torch.randn(3, 8) + 9, torch.randn(3, 8) - 9]
)
def test_zero_is_a_code_whatever_the_rows_hold(weight):
    _, zero_point = quantization_error(EmbeddingObserver, weight)
    assert zero_point.ge(0).all()
    assert zero_point.le(255).all()
    assert torch.equal(zero_point, zero_point.round())


def test_both_backends_quantize_embeddings_alike():
    from fx_sparsity.quantization.pt2e import EmbeddingObserver as Pt2eObserver

    torch.manual_seed(0)
    weight = torch.randn(50, 16)
    eager = EmbeddingObserver(dtype=torch.quint8, **EMBEDDING_SPEC)
    pt2e = Pt2eObserver(dtype=torch.uint8, **EMBEDDING_SPEC)
    eager(weight)
    pt2e(weight)
    for ours, theirs in zip(eager.calculate_qparams(), pt2e.calculate_qparams(), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float())


def test_the_observer_works_inside_torch_prepare_and_convert():
    from fx_sparsity.quantization.embeddings import embedding_qconfig

    model = nn.Sequential(nn.Embedding(10, 8))
    model[0].qconfig = embedding_qconfig
    tq.prepare(model, inplace=True)
    tq.convert(model, inplace=True)
    zero_points = model[0].weight().q_per_channel_zero_points()
    assert torch.equal(zero_points, zero_points.round())
