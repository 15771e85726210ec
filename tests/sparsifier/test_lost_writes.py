"""Writes in place into masked weights: they are lost, and that is said."""

import copy
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fx_sparsity as fxs


def masked(requires_grad=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(requires_grad)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (torch.randn(2, 8),), "2:4")
    sparsifier.step()
    return model, sparsifier


def in_rows(weight):
    weight[0] = 1


def through_a_view(weight):
    weight.view(-1)[3:5].add_(1)


WRITES = {
    **{
        name: getattr(nn.init, name) for name in ("ones_", "orthogonal_", "xavier_uniform_", "eye_")
    },
    "sparse_": lambda weight: nn.init.sparse_(weight, 0.5),
    "clamp_": lambda weight: weight.clamp_(0),
    "add_": lambda weight: weight.add_(1),
    "copy_": lambda weight: weight.copy_(torch.ones(8, 8)),
    "detach": lambda weight: weight.detach().zero_(),
    "rows": in_rows,
    "view": through_a_view,
    "out": lambda weight: torch.ones(8, 8, out=weight),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("notice", ["access", "step", "squash"])
def test_a_lost_write_is_told_once(write, requires_grad, notice):
    model, sparsifier = masked(requires_grad)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        write(model[0].weight)
    ways = {"access": lambda: model[0].weight, "step": sparsifier.step}
    ways["squash"] = lambda: fxs.squash(model, sparsifier)
    with pytest.warns(UserWarning, match=r"0\.weight: something wrote in place"):
        ways[notice]()
    assert notice == "step" or torch.equal(model[0].weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 8))


def by_assignment(model):
    model[0].weight = torch.ones(8, 8)


def by_augmented_assignment(model):
    model[0].weight *= 2


def beneath(model):
    model[0].parametrizations.weight.original.fill_(1)


def by_loading(model):
    model[0].load_state_dict({"weight": torch.ones(8, 8), "bias": torch.ones(8)}, strict=False)


@pytest.mark.parametrize("write", [by_assignment, by_augmented_assignment, beneath, by_loading])
def test_what_takes_effect_is_not_told(write):
    model, sparsifier = masked()
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            write(model)
        assert not torch.equal(model[0].weight, before)
        sparsifier.step()
        fxs.squash(model, sparsifier)


def test_ordinary_use_is_silent():
    """Training, checkpointing, autocast, vmap, compilation, copies, tables that are renormed."""
    model, sparsifier = masked()
    table = nn.Sequential(nn.Embedding(12, 8, max_norm=0.5))
    other = fxs.WeightNormSparsifier()
    fxs.prepare(table, other, (torch.arange(3),), "unstructured 50%")
    x = torch.randn(4, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*wrote in place.*")
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                checkpoint(model, x, use_reentrant=False).sum().backward()
            optimizer.step()
            sparsifier.step()
            compiled(x).sum().backward()
            torch.func.functional_call(model, dict(model.named_parameters()), (x,))
            torch.func.vmap(model)(x)
            torch.jit.trace(model, (x,))(x)
            with torch.inference_mode():
                model(x)
            table(torch.arange(4))
            other.step()
            clone = copy.deepcopy(model)
            clone(x)
            clone[0].weight.sum()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        weight = model[0].weight.detach().clone().zero_()
        assert not bool(weight.any())
        masks = [module for module in model.modules() if hasattr(module, "keep")]
        assert pickle.loads(pickle.dumps(masks[0])).keep.equal(masks[0].keep)


def test_nothing_is_held_beyond_what_others_hold():
    model, _ = masked()
    weight = model[0].weight
    alive = weakref.ref(weight)
    counter = model[0].parametrizations.weight[0]._writes._counter
    assert counter.untyped_storage().nbytes() == 0
    del weight
    assert alive() is None


@pytest.mark.filterwarnings("error:.*something wrote in place")
def test_copies_know_of_no_write():
    model, sparsifier = masked()
    with torch.no_grad():
        model(torch.randn(2, 8))
    copied, _ = copy.deepcopy((model, sparsifier))
    copied(torch.randn(2, 8))
    mask = pickle.loads(pickle.dumps(model[0].parametrizations.weight[0]))
    mask(torch.randn(8, 8))
