"""What the gate must not call ok."""

import math

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.quantization import get_backend
from fx_sparsity.verification import SparsityLostError, read_weights


def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (torch.randn(4, 64),), "2:4")
    sparsifier.step()
    return fxs.squash(model, sparsifier)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("where", ["all", "one"])
def test_kept_values_that_are_dead_or_not_finite(poison, where):
    model, record = pruned()
    assert fxs.verify(model, record)
    places = record["0.weight"].keep.nonzero()
    for i, j in places if where == "all" else places[:1]:
        model[0].weight.data[i, j] = poison
    found = fxs.verify(model, record)
    assert not found.ok
    assert [bool(row.faults) for row in found] == [True, False]
    with pytest.raises(SparsityLostError, match=r"0\.weight"):
        found.raise_if_lost()


def test_the_truth_of_a_verification_is_its_verdict():
    model, record = pruned()
    assert fxs.verify(model, record)
    model[0].weight.data += 1
    found = fxs.verify(model, record)
    assert len(found) == 2
    assert not found


def test_nothing_to_verify_is_not_ok():
    model, _ = pruned()
    found = fxs.verify(model, {})
    assert not found.ok
    with pytest.raises(SparsityLostError, match="no weight to verify"):
        found.raise_if_lost()


# Quantized tensors of torch.ao hand out no scale to write to.
CASES = [
    (backend, sabotage)
    for backend in ("eager", "fx", "pt2e", "torchao")
    for sabotage in ("zeros", "row", "scale")
    if sabotage != "scale" or backend in ("pt2e", "torchao")
]


@pytest.mark.parametrize(("backend", "sabotage"), CASES)
def test_codes_that_are_dead_or_not_finite_without_a_reference(backend, sabotage):
    model, record = pruned()
    inputs = (torch.randn(4, 64),)
    quantized = get_backend(backend).quantize(model, inputs, fxs.find_weights(model, inputs)).model
    assert fxs.verify(quantized, record)
    weight = next(weight for weight in read_weights(quantized) if weight.fqn == "0.weight")
    if sabotage == "scale":
        weight.scale.fill_(math.nan)
    else:
        codes = weight.data.clone()
        rows = slice(None) if sabotage == "zeros" else slice(3, 4)
        codes[rows] = weight.zero_code().expand(codes.shape).to(codes.dtype)[rows]
        weight.write(codes)
    found = fxs.verify(quantized, record)
    per_row = weight.scale.numel() > 1
    assert found.ok == (sabotage == "row" and not per_row), found
