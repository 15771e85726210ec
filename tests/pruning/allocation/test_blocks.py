"""Which weights belong to one repeated module, in models and in graphs of them."""

import copy
import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fx_sparsity as fxs
from fx_sparsity.pruning.allocation.blocks import block_of
from tests.pruning.test_programs import llama
from tests.pruning.test_stages import Layer, stack


def weights_of(model):
    return [name for name, p in model.named_parameters() if p.ndim >= 2]


STACK = {
    "before.weight": "before.weight",
    "between.weight": "between.weight",
    "after.weight": "after.weight",
    **{f"layers.{n}.{name}.weight": f"layers.{n}" for n in range(4) for name in ("up", "down")},
}


def test_layers_are_blocks_and_the_rest_stands_alone():
    model, _ = stack()
    assert block_of(model, weights_of(model)) == STACK
    fxs.WeightNormSparsifier().prepare(model, [{"tensor_fqn": "layers.0.up.weight"}])
    assert block_of(model, STACK) == STACK


def test_wrapped_layers():
    model, _ = stack()
    for n, layer in enumerate(model.layers):
        model.layers[n] = checkpoint_wrapper(layer)
    found = block_of(model, weights_of(model))
    assert Counter(found.values()) == Counter(STACK.values())
    model, _ = stack()
    found = block_of(nn.ModuleDict({"inner": model}), [f"inner.{name}" for name in STACK])
    assert found == {f"inner.{name}": f"inner.{block}" for name, block in STACK.items()}


@pytest.mark.parametrize("stored", [False, True])
def test_graphs_have_the_blocks_of_their_models(stored):
    for model, inputs in (stack()[0], stack()[1][0]), llama():
        program = torch.export.export(copy.deepcopy(model).eval(), (), inputs)
        if stored:
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            program = torch.export.load(file)
        names = weights_of(model)
        assert block_of(program.module(), names) == block_of(model, names)


def test_what_a_block_holds_makes_no_blocks():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    model = nn.Sequential(*(Experts() for _ in range(2)), nn.Linear(4, 4))
    found = block_of(model, weights_of(model))
    assert Counter(found.values()) == {"0": 3, "1": 3, "2.weight": 1}
    assert set(block_of(model, ["0.experts.1.weight", "0.experts.2.weight"]).values()) == {
        "0.experts.1",
        "0.experts.2",
    }
    stages = nn.ModuleList([nn.Sequential(Layer(4), Layer(4)) for _ in range(2)])
    found = block_of(stages, weights_of(stages))
    assert Counter(found.values()) == {f"{a}.{b}": 2 for a in (0, 1) for b in (0, 1)}
