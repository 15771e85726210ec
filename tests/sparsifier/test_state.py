"""Saving, loading, copying, pickling; and any order of operations against a simple model of it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn
from torch.nn.utils import parametrize

from fx_sparsity import DataNormSparsifier, SparsityMapping, WeightNormSparsifier, prepare
from fx_sparsity.sparsifier import DetachedError, MaskError
from tests.models import make
from tests.sparsifier.test_base import FirstRow


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def data_sparsifier():
    torch.manual_seed(0)
    sparsifier = DataNormSparsifier(
        [
            ("a.b", torch.randn(4, 8)),
            ("a_b", nn.Parameter(torch.randn(5, 6))),
            ("type", torch.randn(7)),
        ]
    )
    sparsifier.add_data("half", torch.randn(8, 8).bfloat16(), sparsity_level=0.25)
    sparsifier.step()
    sparsifier.squash_mask(names=["type"])
    sparsifier.state["a_b"]["seen"] = 3
    return sparsifier


def assert_same_data(ours, theirs):
    assert ours.names == theirs.names
    assert ours.data_groups == theirs.data_groups
    for name in ours.names:
        assert torch.equal(ours.get_mask(name), theirs.get_mask(name))
        assert ours.get_mask(name).dtype == theirs.get_mask(name).dtype
        assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name))
        assert ours.get_tensor(name).dtype == theirs.get_tensor(name).dtype
        assert ours.is_squashed(name) == theirs.is_squashed(name)
        assert ours.state[name].counters == theirs.state[name].counters
        assert torch.equal(
            ours.get_data(name, return_original=False), theirs.get_data(name, return_original=False)
        )


@pytest.mark.parametrize("fresh", [True, False])
def test_data_state_goes_through_a_file_into_any_sparsifier(fresh):
    source = data_sparsifier()
    state = through_a_file(source.state_dict())
    before = copy.deepcopy(state)
    held = torch.zeros(4, 8)
    target = (
        DataNormSparsifier() if fresh else DataNormSparsifier([("a.b", held), ("x", torch.ones(2))])
    )
    target.load_state_dict(state)
    assert_same_data(target, source)
    if not fresh:
        assert target.get_data("a.b") is held
    assert str(state) == str(before)
    target.step()
    target.get_mask("a.b").zero_()
    assert_same_data(source, data_sparsifier())
    assert isinstance(target.get_tensor("a_b"), nn.Parameter)


def test_data_masks_are_saved_a_byte_an_element():
    sparsifier = DataNormSparsifier([("a", torch.randn(512, 512))])
    sparsifier.step()
    state = sparsifier.state_dict()["state"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert buffer.tell() < 1.02 * 512 * 512
    assert state["a"]["mask"].is_sparse


def test_non_strict_loading_keeps_other_names():
    source = data_sparsifier()
    target = DataNormSparsifier([("x", torch.ones(2, 4))])
    target.load_state_dict(source.state_dict(), strict=False)
    assert target.names == ["x", *source.names]


def test_a_torch_ao_state_loads():
    from torch.ao.pruning._experimental.data_sparsifier import DataNormSparsifier as Reference

    torch.manual_seed(0)
    data = torch.randn(8, 8)
    reference = Reference([("a", data.clone())], sparsity_level=0.5)
    reference.step()
    target = DataNormSparsifier()
    target.load_state_dict(reference.state_dict())
    assert torch.equal(target.get_mask("a").bool(), reference.get_mask("a").bool())
    assert torch.equal(target.get_data("a"), data)


def test_a_broken_state_changes_nothing():
    sparsifier, state = data_sparsifier(), data_sparsifier().state_dict()
    del state["data_groups"]["half"]
    with pytest.raises(ValueError, match="error loading half: the state has no configuration"):
        sparsifier.load_state_dict(state)
    assert_same_data(sparsifier, data_sparsifier())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_data_sparsifiers_copy_and_pickle_into_working_independent_ones(clone):
    source = data_sparsifier()
    copied = clone(source)
    assert_same_data(copied, source)
    assert copied.norm == source.norm
    copied.get_tensor("a.b").fill_(1)
    copied.get_mask("a_b").zero_()
    copied.step()
    assert_same_data(source, data_sparsifier())


def model_sparsifier(mapping=None):
    model, inputs = make("sequential")
    sparsifier = WeightNormSparsifier()
    if mapping is None:
        sparsifier.prepare(model)
    else:
        prepare(model, sparsifier, inputs, mapping)
    sparsifier.step()
    return model, sparsifier


@pytest.mark.parametrize("mapping", [None, SparsityMapping().set_global("2:4")])
def test_model_state_goes_through_a_file(mapping):
    model, source = model_sparsifier(mapping)
    state = through_a_file(source.state_dict())
    other, _ = make("sequential")
    target = WeightNormSparsifier()
    target.prepare(other, [{"tensor_fqn": "2.weight"}])
    target.load_state_dict(state)
    assert target.names == source.names
    for name in source.names:
        assert torch.equal(target.get_mask(name), source.get_mask(name))
        assert target.get_mask(name).dtype == source.get_mask(name).dtype
    assert torch.equal(other[0].weight, model[0].weight)
    target.step()
    assert torch.equal(other[0].weight, model[0].weight)


def test_strict_loading_takes_other_masks_off():
    model, _ = make("sequential")
    source, target = WeightNormSparsifier(), WeightNormSparsifier()
    source.prepare(model, [{"tensor_fqn": "0.weight"}])
    other, _ = make("sequential")
    target.prepare(other)
    target.load_state_dict(source.state_dict())
    assert target.names == ["0.weight"]
    assert not parametrize.is_parametrized(other[2])


def test_loading_what_the_model_lacks_changes_nothing():
    _, source = model_sparsifier()
    state = source.state_dict()
    model = nn.Sequential(nn.Linear(8, 16))
    target = WeightNormSparsifier()
    target.prepare(model)
    with pytest.raises(MaskError, match=r"2.weight: the model has no such tensor"):
        target.load_state_dict(state)
    assert target.names == ["0.weight"]
    assert target.get_mask("0.weight").eq(1).all()
    target.load_state_dict(state, strict=False)
    assert torch.equal(target.get_mask("0.weight"), source.get_mask("0.weight"))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_without_its_model_is_detached_until_attached(clone):
    model, source = model_sparsifier()
    copied = clone(source)
    with pytest.raises(DetachedError, match=r"0.weight: detached.*attach\(model\)"):
        copied.step()
    with pytest.raises(DetachedError):
        copied.squash_mask()
    assert torch.equal(copied.get_mask("0.weight"), source.get_mask("0.weight"))
    plain, _ = make("sequential")
    copied.attach(plain)
    assert torch.equal(plain[0].weight, model[0].weight)
    copied.step()
    with pytest.raises(MaskError, match="bound to a model already"):
        copied.attach(plain)


def test_attaching_to_a_copied_model_uses_the_masks_it_has():
    model, source = model_sparsifier()
    model_copy, copied = copy.deepcopy(model), copy.deepcopy(source)
    copied.attach(model_copy)
    assert copied.get_mask("0.weight") is model_copy[0].parametrizations.weight[0].mask
    copied.get_mask("0.weight").zero_()
    assert model_copy[0].weight.eq(0).all()
    assert model[0].weight.ne(0).any()


def test_copies_made_together_are_bound_in_graphs_too():
    model, inputs = make("tied")
    gm = torch.export.export(model, inputs, strict=False).module()
    sparsifier = WeightNormSparsifier()
    prepare(gm, sparsifier, mapping=SparsityMapping().set_global("2:4"))
    copied, sparsifier_copy = copy.deepcopy((gm, sparsifier))
    sparsifier_copy.step()
    assert not torch.equal(copied(*inputs), gm(*inputs))
    sparsifier_copy.get_mask("embed.weight").zero_()
    assert copied(*inputs).eq(0).all()


def test_a_squashed_state_comes_back_squashed_and_stays():
    model, source = model_sparsifier()
    source.squash_mask()
    state = through_a_file(source.state_dict())
    other, _ = make("sequential")
    target = WeightNormSparsifier()
    target.prepare(other)
    target.load_state_dict(state)
    assert target.is_squashed("0.weight")
    assert torch.equal(other[0].weight, model[0].weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target.step()
        target.step()
    assert len([w for w in caught if "squashed" in str(w.message)]) == 1
    target.squash_mask()
    assert torch.equal(other[0].weight, model[0].weight)


def test_counters_come_back():
    model, _ = make("sequential")
    source = FirstRow()
    source.prepare(model)
    source.step()
    target = FirstRow()
    target.load_state_dict(source.state_dict())
    assert target.state["0.weight"]["steps"] == 1
    assert target.state == source.state


class AnyOrder(RuleBasedStateMachine):
    """Adding, replacing, stepping, squashing, saving and loading, in any order."""

    names = st.sampled_from(["a", "a.b", "a_b"])
    seeds = st.integers(0, 1000)

    def __init__(self):
        super().__init__()
        self.ours = DataNormSparsifier(sparse_block_shape=(1, 1))
        self.model = {}
        self.saved = None

    @staticmethod
    def make(seed):
        return torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))

    @rule(name=names, seed=seeds, level=st.sampled_from([0.0, 0.25, 0.5, 1.0]), reuse=st.booleans())
    def add(self, name, seed, level, reuse):
        data = self.make(seed)
        old = self.model.get(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.ours.add_data(name, data, reuse_mask=reuse, sparsity_level=level)
        mask = old[1].clone() if old is not None and reuse else torch.ones(2, 6)
        self.model.pop(name, None)
        self.model[name] = [data.clone(), mask, False, level]

    @rule()
    def step(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.ours.step()
        for entry in self.model.values():
            if not entry[2]:
                count = round(entry[3] * 12)
                order = entry[0].abs().flatten().double().sort(stable=True).indices
                mask = torch.ones(12)
                mask[order[:count]] = 0
                entry[1] = mask.view(2, 6)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def squash(self, data):
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.ours.squash_mask(names=[name])
        entry = self.model[name]
        if not entry[2]:
            entry[0], entry[2] = entry[0] * entry[1], True

    @rule()
    def save(self):
        self.saved = (through_a_file(self.ours.state_dict()), copy.deepcopy(self.model))

    @precondition(lambda self: self.saved)
    @rule(fresh=st.booleans())
    def load(self, fresh):
        state, model = self.saved
        if fresh:
            self.ours = DataNormSparsifier(sparse_block_shape=(1, 1))
        self.ours.load_state_dict(state)
        self.model = copy.deepcopy(model)

    @rule()
    def copy(self):
        self.ours = copy.deepcopy(self.ours)

    @invariant()
    def agree(self):
        assert set(self.ours.names) == set(self.model)
        for name, (data, mask, squashed, level) in self.model.items():
            assert torch.equal(self.ours.get_mask(name), mask)
            assert torch.equal(self.ours.get_tensor(name), data)
            assert torch.equal(self.ours.get_data(name, return_original=False), data * mask)
            assert self.ours.is_squashed(name) == squashed
            assert self.ours.data_groups[name]["sparsity_level"] == level


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestAnyOrder = AnyOrder.TestCase
