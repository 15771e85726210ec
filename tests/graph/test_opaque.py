"""Inputs and outputs that are no pytrees do not cost a model its graph."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fx_sparsity import (
    SparsityMapping,
    WandaSparsifier,
    WeightNormSparsifier,
    find_weights,
    lower,
    prepare,
    prune,
)
from fx_sparsity.graph.opaque import copied, expanded, exportable


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    assert config.use_cache  # the default
    return LlamaForCausalLM(config).eval()


def tokens(length=16):
    return {"input_ids": torch.randint(128, (2, length))}


class Box:
    """Holds tensors in whatever way, one of them twice."""

    def __init__(self, *tensors):
        self.first, self.rest = tensors[0], {"again": [tensors[0], *tensors[1:]]}


class Boxed(nn.Module):
    """Takes and returns objects that torch knows nothing of, and changes the one that it takes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, box, scale=1.0):
        y = self.layer(box.first) * scale + box.rest["again"][1]
        box.first = y
        return {"box": Box(y, y + 1), "owner": self, "name": "y"}


def box():
    torch.manual_seed(0)
    return Box(torch.randn(4, 8), torch.randn(4, 8))


def test_objects_count_as_their_tensors():
    made = box()
    assert [t.shape for t in expanded((made, 3))[0]] == [(4, 8), (4, 8)]
    other = copied({"a": made})["a"]
    assert torch.equal(other.first, made.first)
    assert other.first is not made.first
    assert other.rest["again"][0] is other.first  # one tensor stays one


def test_a_graph_of_objects_computes_what_the_model_does():
    model = Boxed().eval()
    with exportable(model, (box(),), {"scale": 2.0}) as (args, kwargs):
        program = torch.export.export(model, args, kwargs, strict=False)
    found = program.module()(*expanded((box(),)), scale=2.0)
    expected = model(copied(box()), scale=2.0)["box"]
    assert torch.equal(found["box"][0], expected.first)
    assert torch.equal(found["box"][1], expected.rest["again"][1])
    assert "forward" not in vars(model)


def test_inputs_that_are_objects_are_captured_and_stay_as_they_are():
    model, made = Boxed().eval(), box()
    before = made.first.clone()
    weights = find_weights(model, (made,))
    assert (weights.frontend, list(weights)) == ("torch.export", ["layer.weight"])
    mapping = SparsityMapping().set_global("unstructured 50%")
    _, report = prune(model, WandaSparsifier(), [(made,), (box(),)], mapping)
    assert (report.sequential, report["layer.weight"].tokens) == (True, 8)
    assert torch.equal(made.first, before)


def test_a_forward_of_the_instance_is_put_back():
    model = nn.Linear(8, 8)
    model.forward = own = lambda x: nn.Linear.forward(model, x) + 1
    assert list(find_weights(model, (torch.randn(2, 8),))) == ["weight"]
    assert model.forward is own


def test_a_model_that_raises_is_put_back():
    model = Boxed()
    with pytest.raises(ValueError, match="example_inputs"):
        find_weights(model, (torch.randn(4, 8),))
    assert "forward" not in vars(model)


@torch.no_grad()
def test_language_models_at_their_defaults_go_through_all_verbs():
    model, batches = llama(), [tokens(), tokens()]
    assert find_weights(model, batches[0]).frontend == "torch.export"
    prepare(llama(), WeightNormSparsifier(), batches[0], {"object_type": {"linear": "2:4"}})
    mapping = SparsityMapping().set_object_type("linear", "2:4")
    method = WandaSparsifier()
    model, report = prune(model, method, batches, mapping)
    assert report.sequential
    assert report.reason == "1 graph, block by block"
    method.squash_mask()
    expected = model(**batches[0]).logits
    lowered, rows = lower(model, batches[0], "always")
    assert len(rows.lowered) == 15
    torch.testing.assert_close(lowered(**batches[0]).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_decides_nothing_about_what_is_pruned():
    """The same masks and values as without a cache."""
    found = []
    for use_cache in (True, False):
        model = llama()
        model.config.use_cache = use_cache
        method = WandaSparsifier()
        prune(model, method, [tokens(), tokens(12)], "unstructured 50%")
        found.append(method)
    for name in found[0].names:
        assert torch.equal(found[0].get_mask(name), found[1].get_mask(name)), name


def test_a_cache_that_is_given_is_an_input():
    model, cache = llama(), DynamicCache()
    with torch.no_grad():
        model(**tokens(4), past_key_values=cache)
    length = cache.get_seq_length()
    weights = find_weights(model, {**tokens(1), "past_key_values": cache})
    assert weights.frontend == "torch.export"
    assert len(weights) == len(find_weights(model, tokens()))
    assert cache.get_seq_length() == length
