"""`mode="reduce-overhead"`: what CUDA graphs replay reads masks and weights where they lie."""

import copy

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity import passes
from fx_sparsity.lowering.compile_backend import backend

MODE = torch._inductor.list_mode_options("reduce-overhead")
DTYPE, DEVICE = torch.float16, "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def dense():
    torch.manual_seed(0)
    layers = nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)
    return nn.Sequential(*layers).eval().to(DEVICE, DTYPE)


def x(seed):
    made = torch.randn(16, 256, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, DTYPE)


def masked(model):
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (x(0),), "2:4")
    return sparsifier


def pruned():
    sparsifier = masked(model := dense())
    sparsifier.step()
    return fxs.squash(model, sparsifier)[0]


def live():
    sparsifier = masked(model := dense())
    return torch.compile(model, options=MODE), sparsifier.step


def squashed():
    return torch.compile(pruned(), options=MODE), None


def lowered():
    model, report = fxs.lower(pruned(), (x(0),), "always")
    assert not report.dense
    return torch.compile(model, options=MODE), None


def by_backend():
    options = {"mapping": "2:4", "policy": "always", "inductor": MODE}
    return torch.compile(dense(), backend=backend, options=options), None


def in_inductor():
    masking = passes.InductorPrepare(dense(), fxs.WeightNormSparsifier(), "2:4")
    compiled = torch.compile(masking.model, options={**masking.options, **MODE})
    return compiled, masking.sparsifier.step


@pytest.mark.parametrize("make", [live, squashed, lowered, by_backend, in_inductor])
@torch.no_grad()
def test_it_is_replayed_with_the_masks_of_now(make):
    torch._dynamo.reset()
    compiled, step = make()
    plain, oracle = dense(), pruned()
    eps = 16 * torch.finfo(DTYPE).eps
    for seed in range(4):  # a warm-up, a recording, replays
        expected = plain if step is not None else oracle
        found = copy.deepcopy(compiled(x(seed)))
        torch.testing.assert_close(found, expected(x(seed)), rtol=eps, atol=eps)
    if step is not None:
        step()
        torch.testing.assert_close(compiled(x(5)), oracle(x(5)), rtol=eps, atol=eps)
