"""Low-rank factors under a mask: their gradients, and a merge that changes nothing."""

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.sparsifier import MaskError
from fx_sparsity.training import SparseLoRA
from tests.training.toys import prepared


def sparse():
    sparsifier = fxs.WeightNormSparsifier()
    toy, model = prepared(sparsifier, "2:4")
    sparsifier.step()
    return toy, *fxs.squash(model, sparsifier)


def test_gradients_are_those_of_the_masked_sum():
    toy, model, record = sparse()
    base, keep = model[0].weight.detach().clone(), record["0.weight"].keep
    lora = SparseLoRA(model, record, rank=3, alpha=6.0)
    factors = lora.factors["0.weight"]
    assert torch.equal(model[0].weight, base)
    with torch.no_grad():
        factors.up.normal_()
    toy.loss(model).backward()
    up, down = factors.up.detach(), factors.down.detach()
    gradient = toy.gradient((base + 2 * up @ down) * keep) * keep
    torch.testing.assert_close(factors.up.grad, 2 * gradient @ down.T)
    torch.testing.assert_close(factors.down.grad, 2 * up.T @ gradient)
    assert not model[0].parametrizations.weight.original.requires_grad


def test_what_was_trained_is_what_is_merged():
    toy, model, record = sparse()
    weight, start = model[0].weight, toy.loss(model).item()
    lora = SparseLoRA(model, record)
    optimizer = torch.optim.Adam(lora.parameters(), 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        toy.loss(model).backward()
        optimizer.step()
    trained = toy.loss(model)
    lora.merge()
    assert model[0].weight is weight
    assert weight.requires_grad
    assert toy.loss(model).item() == trained.item() < start
    assert fxs.verify(model, record).ok
    assert list(lora.parameters()) == []


def test_what_is_refused_and_what_is_passed_over():
    toy, model, record = sparse()
    with pytest.raises(
        MaskError, match="0.weight: expected a weight of shape .8, 16., found .4, 16"
    ):
        SparseLoRA(nn.Sequential(nn.Linear(16, 4)), record)
    with pytest.raises(
        MaskError, match="0.weight: expected a weight of shape .8, 16., found nothing"
    ):
        SparseLoRA(nn.Linear(16, 8), record)
    with pytest.raises(ValueError, match="a rank of 1 or more"):
        SparseLoRA(model, record, rank=0)
    SparseLoRA(model, record)
    with pytest.raises(MaskError, match="0.weight is already parametrized by LowRank"):
        SparseLoRA(model, record)
    conv, sparsifier = nn.Sequential(nn.Conv2d(4, 4, 1)), fxs.WeightNormSparsifier()
    fxs.prepare(conv, sparsifier, (torch.randn(1, 4, 3, 3),), "unstructured 50%")
    sparsifier.step()
    lora = SparseLoRA(*fxs.squash(conv, sparsifier))
    assert lora.dense == {"0.weight": "low-rank factors need a matrix, found 4 dimensions"}
