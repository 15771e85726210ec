import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.quantization import compare_orders, get_backend
from tests.models import make, make_bert
from tests.sparsifier.test_base import assert_unchanged, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")
MAPPING = fxs.SparsityMapping().set_global("2:4")
ORDERS = ("sparsify_first", "quantize_first", "interleaved")


@pytest.mark.parametrize("backend", ["eager", "pt2e"])
def test_errors_are_those_of_the_models_that_come_back(backend):
    model, inputs = make("recommender")
    before = snapshot(model)
    result = compare_orders(
        model, fxs.WeightNormSparsifier(), inputs, backend=backend, mapping=MAPPING, orders=ORDERS
    )
    assert_unchanged(model, before)
    assert list(result) == list(ORDERS)
    expected = model(*inputs).double()
    for order in ORDERS:
        result[order].verification.raise_if_lost()
        actual = result[order].model(*inputs).double()
        error = (torch.linalg.norm(actual - expected) / torch.linalg.norm(expected)).item()
        assert result[order].error == pytest.approx(error, rel=1e-6)
    assert result[result.best].error == min(r.error for r in result.values())
    assert 0 < result.quantized < min(r.error for r in result.values())
    assert f"(the least is lost by {result.best})" in str(result)


def test_a_model_with_structured_outputs_and_data_of_its_own():
    model, inputs = make_bert()
    tokens = torch.randint(64, (2, 8))
    data = [inputs, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]
    result = compare_orders(
        model, fxs.WeightNormSparsifier(), inputs, backend="eager", mapping=MAPPING, data=data
    )
    quantized = get_backend("eager").quantize(model, inputs, fxs.find_weights(model, inputs)).model
    difference = total = 0.0
    for batch in data:
        ours, theirs = quantized(**batch), model(**batch)
        difference += (ours.last_hidden_state - theirs.last_hidden_state).double().pow(2).sum()
        total += theirs.last_hidden_state.double().pow(2).sum()
    assert result.quantized == pytest.approx((difference / total).sqrt().item(), rel=1e-4)


class Kept:
    """No pytree, as the caches of language models."""

    def __init__(self, states):
        self.states = states


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        return y, Kept(y + 1)


@pytest.mark.parametrize("backend", ["eager", "pt2e"])
def test_objects_that_are_no_pytrees_count_in_every_backend(backend):
    torch.manual_seed(0)
    inputs = (torch.randn(4, 8),)
    result = compare_orders(
        Cached().eval(), fxs.WeightNormSparsifier(), inputs, backend=backend, mapping=MAPPING
    )
    assert 0 < result.quantized < result[result.best].error < 1


def test_bad_requests():
    model, inputs = make("sequential")
    for orders in ((), ("qat",)):
        with pytest.raises(ValueError, match="orders: expected some of sparsify_first"):
            compare_orders(
                model, fxs.WeightNormSparsifier(), inputs, backend="eager", orders=orders
            )

    class Count(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax()

    with pytest.raises(ValueError, match="Count has no floating output to compare"):
        compare_orders(Count(8, 8), fxs.WeightNormSparsifier(), inputs, backend="eager")
