"""peft's adapters around sparse and masked weights: merges, records, held zeros."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.sparsifier import MaskError

X = (torch.randn(4, 16),)


def network():
    torch.manual_seed(0)
    layers = {"up": nn.Linear(16, 32), "act": nn.ReLU(), "down": nn.Linear(32, 16)}
    return nn.Sequential(OrderedDict(layers))


def lora(model, **settings):
    """With factors that make a difference."""
    wrapped = get_peft_model(model, LoraConfig(target_modules=["up", "down"], r=2, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return wrapped


def sparsify(model, inputs=X):
    sparsifier = fxs.WeightNormSparsifier()
    model = fxs.prepare(
        model, sparsifier, inputs, {"object_type": {"linear": None, nn.Linear: "2:4"}}
    )
    sparsifier.step()
    return model, sparsifier


def masks_first():
    model, sparsifier = sparsify(network())
    return lora(model), sparsifier


def adapters_first():
    wrapped = lora(network())
    names = [n for n in fxs.find_weights(wrapped, X) if "base_layer" in n]
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(wrapped, sparsifier, X, {"module_name": dict.fromkeys(names, "2:4")})
    sparsifier.step()
    return wrapped, sparsifier


@pytest.mark.parametrize("make", [masks_first, adapters_first])
@pytest.mark.parametrize(
    "merge",
    [
        lambda wrapped: wrapped.merge_and_unload(),
        lambda wrapped: wrapped.merge_and_unload(safe_merge=True),
        lambda wrapped: wrapped.merge_adapter(),
        lambda wrapped: copy.deepcopy(wrapped).merge_and_unload(),
    ],
)
def test_a_merge_under_a_mask_is_refused(make, merge):
    wrapped, _ = make()
    before = wrapped(*X)
    with pytest.raises(MaskError, match=r"merge: .*weight of Linear still masked"):
        merge(wrapped)
    assert torch.equal(wrapped(*X), before)


@pytest.mark.parametrize("make", [masks_first, adapters_first])
def test_after_squashing_it_merges_and_the_zeros_can_be_held(make):
    wrapped, sparsifier = make()
    model = sparsifier.model
    _, record = fxs.squash(model, sparsifier)
    assert fxs.verify(wrapped, record).ok
    held = fxs.hold(torch.optim.SGD(wrapped.parameters(), 0.1), wrapped, record)
    expected = wrapped(*X)
    wrapped.merge_adapter()
    assert torch.allclose(wrapped(*X), expected, atol=1e-5)
    assert not fxs.verify(wrapped, record).ok
    held.apply()
    assert fxs.verify(wrapped, record).ok
    pickle.loads(pickle.dumps(model))
    assert "merge" not in vars(wrapped.base_model.model.up)


def test_a_record_of_the_plain_model_finds_weights_through_wrappers():
    model, sparsifier = sparsify(network())
    model, record = fxs.squash(model, sparsifier)
    assert list(record) == ["up.weight", "down.weight"]
    wrapped = lora(model)
    for form in (wrapped, nn.DataParallel(wrapped), torch.compile(wrapped), wrapped.base_model):
        assert fxs.verify(form, record).ok
    optimizer = torch.optim.AdamW(wrapped.parameters(), weight_decay=0.1)
    held = fxs.hold(optimizer, wrapped, record)
    for _ in range(3):
        wrapped(*X).square().sum().backward()
        optimizer.step()
    held.remove()
    assert fxs.verify(wrapped, record).ok
    wrapped.base_model.model.up.base_layer.weight.data += 1
    assert [row.fqn for row in fxs.verify(wrapped, record) if row.faults] == ["up.weight"]
    plain = wrapped.unload()
    assert not fxs.verify(plain, record).ok


def test_hold_survives_a_state_that_is_assigned():
    model, sparsifier = sparsify(network())
    model, record = fxs.squash(model, sparsifier)
    held = fxs.hold(torch.optim.SGD(model.parameters(), 0.1), model, record)
    model.load_state_dict(
        {k: torch.ones_like(v) for k, v in model.state_dict().items()}, assign=True
    )
    assert not fxs.verify(model, record).ok
    held.apply()
    assert fxs.verify(model, record).ok
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fxs.hold(optimizer, model, record)
    model(*X).sum().backward()
    optimizer.step()
    assert fxs.verify(model, record).ok


def test_merging_elsewhere_is_as_before():
    plain = lora(network())
    expected = plain(*X)
    assert torch.allclose(plain.merge_and_unload()(*X), expected, atol=1e-5)
