"""What must not be lost in silence: gradients, masks on failure, zeros after training."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

import fx_sparsity as fxs
from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.pruning.methods import RandomSparsifier
from fx_sparsity.sparsifier import Mask, MaskError
from fx_sparsity.sparsifier.target import Target


def elements(level=0.5):
    return fxs.WeightNormSparsifier(
        sparsity_level=level, sparse_block_shape=(1, 1), zeros_per_block=1
    )


TABLES = {
    "bag": lambda: nn.EmbeddingBag(20, 8, sparse=True),
    "bag mean": lambda: nn.EmbeddingBag(20, 8, sparse=True, mode="mean"),
    "table": lambda: nn.Embedding(20, 8, sparse=True),
    "padded": lambda: nn.Embedding(20, 8, sparse=True, padding_idx=3),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("boolean", [False, True])
def test_sparse_gradients_are_those_of_the_dense_table_where_it_is_kept(kind, boolean):
    torch.manual_seed(0)
    model = nn.Sequential(TABLES[kind]())
    dense = copy.deepcopy(model)
    sparsifier = elements()
    first = torch.ones(20, 8, dtype=torch.bool if boolean else torch.float32)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight", "mask": first}])
    sparsifier.step()
    keep = sparsifier.get_mask("0.weight").bool()
    indices = torch.randint(20, (6, 3))
    model(indices).sum().backward()
    with torch.no_grad():
        dense[0].weight.mul_(keep)
    dense(indices).sum().backward()
    found = model[0].parametrizations.weight.original.grad
    assert found.is_sparse
    expected = dense[0].weight.grad.to_dense() * keep
    torch.testing.assert_close(found.to_dense(), expected)


def test_sparse_adam_moves_kept_elements_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 8, sparse=True))
    sparsifier = elements()
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    keep = sparsifier.get_mask("0.weight").bool()
    before = model[0].parametrizations.weight.original.detach().clone()
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(20, (4, 3))).square().sum().backward()
        optimizer.step()
    after = model[0].parametrizations.weight.original.detach()
    assert torch.equal(after[~keep], before[~keep])
    assert not torch.equal(after[keep], before[keep])
    assert sparsifier.get_data("0.weight", return_original=False).shape == (20, 8)


def test_masks_have_second_and_forward_derivatives_and_batches():
    mask = fxs.Mask(torch.rand(4, 4) > 0.5)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(mask, weight, check_forward_ad=True)
    torch.autograd.gradgradcheck(mask, weight)
    stack = torch.randn(3, 4, 4, requires_grad=True)
    found = torch.func.vmap(mask)(stack)
    assert torch.equal(found, torch.where(mask.keep, stack, 0))


@pytest.mark.parametrize("pattern", ["unstructured 50%", "2:4", "block:4x4 50%", "rows 50%"])
def test_a_step_between_forward_and_backward_raises(pattern):
    model = nn.Sequential(nn.Linear(64, 64))
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (torch.randn(4, 64),), pattern)
    sparsifier.step()
    y = model(torch.randn(4, 64))
    sparsifier.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Fails(fxs.WeightNormSparsifier):
    """Fails at one weight, in the middle of writing its mask."""

    at = None

    def update_mask(self, module, tensor_name, **config):
        if config["tensor_fqn"] == self.at:
            self.get_mask(self.at)[0] = 0
            raise RuntimeError("injected")
        return super().update_mask(module, tensor_name, **config)


@pytest.mark.parametrize("at", ["0.weight", "1.weight", "2.weight"])
@pytest.mark.parametrize("boolean", [False, True])
def test_a_failing_step_changes_nothing(at, boolean):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    sparsifier = Fails(sparsity_level=0.5)
    kinds = torch.bool if boolean else torch.float32
    first = [torch.rand(64, 64) > 0.3 for _ in range(3)]
    config = [{"tensor_fqn": f"{i}.weight", "mask": mask.to(kinds)} for i, mask in enumerate(first)]
    sparsifier.prepare(model, config)
    before = {name: sparsifier.get_mask(name).clone() for name in sparsifier.names}
    given = [sparsifier.is_given(name) for name in sparsifier.names]
    sparsifier.at = at
    with pytest.raises(RuntimeError, match="injected"):
        sparsifier.step()
    assert all(torch.equal(sparsifier.get_mask(name), mask) for name, mask in before.items())
    assert [sparsifier.is_given(name) for name in sparsifier.names] == given
    assert sparsifier.steps == 0
    sparsifier.at = None
    sparsifier.step()
    assert not torch.equal(sparsifier.get_mask(at), before[at])


def test_a_failing_data_step_changes_nothing():
    class FailsAt(fxs.DataNormSparsifier):
        def update_mask(self, name, data, **config):
            if name == "b":
                raise RuntimeError("injected")
            return super().update_mask(name, data, **config)

    sparsifier = FailsAt([("a", torch.randn(8, 8)), ("b", torch.randn(8, 8))], sparsity_level=0.5)
    with pytest.raises(RuntimeError, match="injected"):
        sparsifier.step()
    assert bool(sparsifier.get_mask("a").all())


@pytest.mark.parametrize("bad", ["meta", "shape"])
def test_a_failing_load_changes_nothing(bad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = elements()
    sparsifier.prepare(model)
    sparsifier.step()
    state, before = sparsifier.state_dict(), copy.deepcopy(sparsifier.state_dict())
    state["state"]["0.weight"]["mask"] = torch.zeros(8, 8, dtype=torch.bool)
    wrong = torch.ones((8, 8) if bad == "meta" else (4, 8), dtype=torch.bool)
    state["state"]["1.weight"]["mask"] = wrong.to("meta") if bad == "meta" else wrong
    with pytest.raises(MaskError, match=r"1\.weight"):
        sparsifier.load_state_dict(state)
    assert sparsifier.names == ["0.weight", "1.weight"]
    assert len(sparsifier.groups) == 2
    after = sparsifier.state_dict()
    for name in sparsifier.names:
        found, expected = (s["state"][name]["mask"].to_dense() for s in (after, before))
        assert torch.equal(found, expected)
    fresh = elements()
    with pytest.raises(MaskError, match=r"1\.weight"):
        fresh.load_state_dict({**state, "state": {**state["state"]}}) if bad == "meta" else (
            sparsifier.load_state_dict(state)
        )
    assert fresh.names == []


def test_squashing_again_after_training_bakes_again():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.randn(4, 8),)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, x, "2:4")
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    model[0].weight.data += 1
    assert not fxs.verify(model, record).ok
    model, again = fxs.squash(model, sparsifier)
    assert fxs.verify(model, again).ok
    assert torch.equal(again["0.weight"].keep, record["0.weight"].keep)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("where", ["bake", "detach"])
def test_a_squash_that_fails_says_how_far_it_came_and_can_be_repeated(place, where, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), (torch.randn(4, 8),)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, x, "2:4")
    sparsifier.step()
    expected = [sparsifier.get_data(f"{i}.weight", return_original=False).clone() for i in range(3)]
    owner = {"bake": Mask, "detach": Target}[where]
    called, usual = [], getattr(owner, where)

    def failing(self, *arguments):
        called.append(self)
        if len(called) == place + 1:
            raise MemoryError("injected")
        return usual(self, *arguments)

    monkeypatch.setattr(owner, where, failing)
    with pytest.raises(MemoryError) as caught:
        fxs.squash(model, sparsifier)
    monkeypatch.undo()
    assert f"{place} of 3 masks are squashed" in caught.value.__notes__[0]
    assert [is_parametrized(layer) for layer in model] == [i >= place for i in range(3)]
    model, record = fxs.squash(model, sparsifier)
    assert fxs.verify(model, record).ok
    assert all(torch.equal(model[i].weight, expected[i]) for i in range(3))


@pytest.mark.parametrize("method", [fxs.MagnitudeSparsifier, RandomSparsifier])
def test_methods_that_look_at_no_data_step_without(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 16))
    sparsifier, x = method(), (torch.randn(2, 4, 8, 8),)
    fxs.prepare(model, sparsifier, x, "2:4")
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    assert fxs.verify(model, record).ok
    assert all(row.sparsity == 0.5 for row in fxs.verify(model, record))


def test_magnitudes_without_data_are_those_of_the_norm_sparsifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(4, 8, 3))
    masks = []
    for sparsifier in (fxs.MagnitudeSparsifier(), fxs.WeightNormSparsifier(norm="L1")):
        held = copy.deepcopy(model)
        fxs.prepare(held, sparsifier, None, "unstructured 50%")
        sparsifier.step()
        masks.append([sparsifier.get_mask(name).bool() for name in sparsifier.names])
    assert all(map(torch.equal, *masks))


def test_methods_that_need_data_still_say_so():
    sparsifier = fxs.WandaSparsifier()
    fxs.prepare(nn.Linear(8, 8), sparsifier, None, "2:4")
    with pytest.raises(MaskError, match="needs calibration data"):
        sparsifier.step()


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(0, 2**32))
def test_bits_are_packed_lowest_first(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed, flat = pack_bits(mask), mask.reshape(-1).tolist()
    expected = [
        sum(bit << i for i, bit in enumerate(flat[start : start + 8]))
        for start in range(0, len(flat), 8)
    ]
    assert packed.tolist() == expected
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_the_selection_still_compiles_to_one_graph_and_exports():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (x,), "2:4")
    sparsifier.step()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    grad = model[0].parametrizations.weight.original.grad
    keep = sparsifier.get_mask("0.weight")
    assert bool((grad[~keep] == 0).all())
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), F.linear(x, model[0].weight, model[0].bias))
