"""Which weights belong to one repeated module, and pruning them at once."""

import copy
import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fx_sparsity as fxs
from fx_sparsity.pruning.graph_blocks import block_of
from fx_sparsity.pruning.methods import SparseGPTSparsifier
from tests.models import make_bert
from tests.pruning.test_observe import no_graph  # noqa: F401
from tests.pruning.test_programs import llama
from tests.pruning.test_stages import STAGES, Layer, by_hand, stack
from tests.pruning.tiny_methods import Recorded, RecordedSquares, TinyWanda


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


@pytest.mark.parametrize("make_method", [RecordedSquares, Recorded])
@pytest.mark.parametrize("shapes", ["dynamic", "a graph each"])
def test_weights_of_a_block_see_it_dense_and_the_pruned_ones_before_it(make_method, shapes):
    """As hooks on a model that is pruned stage by stage do, and as the reference codes go about."""
    model, batches = stack()
    if shapes == "a graph each":
        batches.append({"x": batches[0]["x"][:, None] + 1, "gain": batches[0]["gain"]})
    reference, method = copy.deepcopy(model), make_method()
    _, report = fxs.prune(model, method, batches, "unstructured 50%", sequential="blocks")
    count = "3 graphs" if shapes == "a graph each" else "1 graph"
    assert report.reason == f"{count}, block by block"
    assert report.sequential
    assert list(report) == [f"{name}.weight" for names in STAGES for name in names]
    grams, masks = by_hand(reference, batches, STAGES, make_method)
    for fqn, gram in zip(report, method.grams, strict=True):
        name = fqn.removesuffix(".weight")
        assert torch.allclose(gram[0].double(), grams[name], rtol=1e-4, atol=1e-3), fqn
        assert torch.equal(method.get_mask(fqn), masks[name]), fqn
    for batch in batches:
        assert torch.allclose(model(**batch), reference(**batch), atol=1e-5)


@pytest.mark.usefixtures("no_graph")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_graphs_and_running_models_of_blocks_are_pruned_alike(name, monkeypatch):
    model, inputs = llama() if name == "llama" else make_bert()
    batches = [inputs, {k: v.flip(-1) for k, v in inputs.items()}]
    mapping = fxs.SparsityMapping().set_object_type("linear", "unstructured 50%")
    running, walked = SparseGPTSparsifier(), SparseGPTSparsifier()
    fxs.prune(copy.deepcopy(model), running, batches, mapping)
    monkeypatch.undo()
    _, report = fxs.prune(model, walked, batches, mapping, sequential="blocks")
    assert "block by block" in report.reason
    for fqn in report:
        agree = (running.get_mask(fqn) == walked.get_mask(fqn)).float().mean()
        assert agree > 0.99, fqn


def test_what_has_no_blocks_is_pruned_weight_by_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 4))).eval()
    batches, method, other = [(torch.randn(30, 8),)], Recorded(), Recorded()
    _, report = fxs.prune(copy.deepcopy(model), method, batches, sequential="blocks")
    assert report.reason == "1 graph"
    fxs.prune(model, other, batches)
    for found, wanted in zip(method.grams, other.grams, strict=True):
        assert torch.equal(found, wanted)


def test_a_method_says_how_weights_take_turns_unless_it_is_told():
    for method, by_blocks in (fxs.WandaSparsifier, True), (SparseGPTSparsifier, False):
        found = {}
        for asked in (None, True, "blocks"):
            model, batches = stack()
            _, report = fxs.prune(
                model, method(), batches, "unstructured 50%", sequential=asked, progress=False
            )
            found[asked] = (report.reason, model(**batches[0]))
        reason, outputs = found["blocks" if by_blocks else True]
        assert found[None][0] == reason
        assert torch.equal(found[None][1], outputs)
        assert found[True][0] != found["blocks"][0]


def test_other_words_are_refused():
    model, batches = stack()
    with pytest.raises(ValueError, match="expected None, True, False or .blocks., found 'block'"):
        fxs.prune(model, TinyWanda(), batches, sequential="block")


def test_a_weight_that_several_blocks_share_waits_for_the_last():
    model, batches = stack()
    model.layers[2].up.weight = model.layers[0].up.weight
    _, report = fxs.prune(model, TinyWanda(), batches, sequential="blocks")
    names = list(report)
    assert names.index("layers.0.up.weight") > names.index("layers.1.down.weight")
    assert report["layers.0.up.weight"].tokens == 160
    assert report["layers.1.up.weight"].tokens == 80


def test_statistics_of_a_block_are_freed_when_it_is_pruned():
    sizes = {}
    for depth in (2, 6):
        model, batches = stack(depth=depth)
        _, report = fxs.prune(model, RecordedSquares(), batches, sequential="blocks")
        sizes[depth] = report.statistics_bytes
    assert sizes[2] == sizes[6]
