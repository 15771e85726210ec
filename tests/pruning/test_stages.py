"""Without a graph: repeated blocks in turn, each after those before it are pruned."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fx_sparsity as fxs
from fx_sparsity import SparsityMapping, prune
from fx_sparsity.pruning.methods import SparseGPTSparsifier
from fx_sparsity.pruning.stages import describe, find_blocks
from fx_sparsity.sparsifier import dense_state_dict
from tests.models import make, make_bert
from tests.pruning.test_observe import no_graph  # noqa: F401
from tests.pruning.test_programs import llama
from tests.pruning.test_prune import Interrupted
from tests.pruning.tiny_methods import Recorded, RecordedSquares, TinyWanda

pytestmark = pytest.mark.usefixtures("no_graph")


class Layer(nn.Module):
    """Two weights around something that mixes inputs, and a path past them."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, gain=None):
        x = x if gain is None else x * gain
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """Something before, between and after its layers; one of these is used twice."""

    def __init__(self, depth=4, width=12, again=False):
        super().__init__()
        self.before, self.between = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.after = nn.Linear(width, 4)
        self.again, self.calls = again, 0

    def forward(self, x, gain=None):
        self.calls += 1
        x = self.before(x)
        for number, layer in enumerate(self.layers):
            if number == 2:
                x = self.between(x).tanh()
            x = layer(x, gain=gain)
        if self.again:
            x = self.layers[1](x)
        return self.after(x)


def stack(again=False, depth=4):
    torch.manual_seed(0)
    model = Stack(depth=depth, again=again).eval()
    mix = torch.randn(12, 12)
    return model, [{"x": torch.randn(n, 12) @ mix, "gain": torch.rand(12)} for n in (30, 50)]


def by_hand(model, batches, stages, sparsifier_of):
    """Masks and Gram matrices of stages, from hooks on a model that is pruned stage by stage."""
    grams, masks = {}, {}
    for names in stages:
        seen = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, args, found=found: found.append(args[0].detach().flatten(0, -2))
            )
            for name, found in seen.items()
        ]
        for batch in batches:
            model(**batch)
        for handle in handles:
            handle.remove()
        for name in names:
            x = torch.cat(seen[name])
            layer = nn.Sequential(model.get_submodule(name))
            grams[name] = x.double().T @ x.double()
            method = sparsifier_of()
            prune(layer, method, [(x,)], "unstructured 50%")
            masks[name] = method.get_mask("0.weight").clone()
            fxs.squash(layer, method)
    return grams, masks


STAGES = [
    ["before"],
    ["layers.0.up", "layers.0.down"],
    ["layers.1.up", "layers.1.down"],
    ["between"],
    ["layers.2.up", "layers.2.down"],
    ["layers.3.up", "layers.3.down"],
    ["after"],
]


@pytest.mark.parametrize("make_method", [RecordedSquares, Recorded])
def test_each_block_sees_what_the_pruned_ones_before_it_give_out(make_method, caplog):
    model, batches = stack()
    reference, method = copy.deepcopy(model), make_method()
    _, report = prune(model, method, batches, "unstructured 50%")
    assert report.reason == "no graph (CaptureError), 4 blocks of Layer in turn"
    assert report.sequential
    assert "sequential: no graph" in str(report)
    assert "statistics of a block are taken at once; for a graph, change what" in caplog.text
    assert "no graph for this test" in caplog.text
    assert list(report) == [f"{name}.weight" for names in STAGES for name in names]
    grams, masks = by_hand(reference, batches, STAGES, make_method)
    for fqn, gram in zip(report, method.grams, strict=True):
        name = fqn.removesuffix(".weight")
        assert torch.allclose(gram[0].double(), grams[name], rtol=1e-4, atol=1e-3), fqn
        assert torch.equal(method.get_mask(fqn), masks[name]), fqn
        assert report[fqn].tokens == 80
    for batch in batches:
        assert torch.allclose(model(**batch), reference(**batch), atol=1e-5)


def test_the_model_is_not_run_beyond_the_block():
    model, batches = stack()
    ran = []
    for name in ("before", "layers.0", "layers.3", "after"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    prune(model, TinyWanda(), batches)
    # The dense pass, and that of each stage from this one's on.
    counts = {name: ran.count(name) // len(batches) for name in dict.fromkeys(ran)}
    assert counts == {"before": 8, "layers.0": 7, "layers.3": 3, "after": 2}
    assert not any(m._forward_hooks for m in model.layers[1:3])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_statistics_are_those_of_one_block(monkeypatch):
    model, batches = stack(depth=6)
    _, report = prune(copy.deepcopy(model), RecordedSquares(), batches)
    _, at_once = prune(model, RecordedSquares(), batches, sequential=False)
    assert at_once.reason == "no graph (CaptureError), the running model was observed"
    assert not at_once.sequential
    vectors = 2 * 8 + (12 + 24) * 4
    one_block = (12 * 12 + 24 * 24) * 4 + vectors
    assert report.statistics_bytes == one_block
    assert at_once.statistics_bytes > 6 * one_block


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_blocks_of_a_language_model(name, monkeypatch):
    model, inputs = llama() if name == "llama" else make_bert()
    batches = [inputs, {k: v.flip(-1) for k, v in inputs.items()}]
    mapping = SparsityMapping().set_object_type("linear", "2:4")
    method, walked = SparseGPTSparsifier(), SparseGPTSparsifier()
    pruned, report = prune(copy.deepcopy(model), method, batches, mapping)
    kind = "LlamaDecoderLayer" if name == "llama" else "BertLayer"
    assert report.reason == f"no graph (CaptureError), 2 blocks of {kind} in turn"
    monkeypatch.undo()
    other, expected = prune(copy.deepcopy(model), walked, batches, mapping)
    assert expected.reason == "1 graph"
    assert set(report) == set(expected)
    first = [fqn for fqn in report if "layers.0" in fqn or "layer.0" in fqn][:3]
    assert all(torch.equal(method.get_mask(fqn), walked.get_mask(fqn)) for fqn in first)
    agree = [(method.get_mask(f) == walked.get_mask(f)).float().mean() for f in report]
    assert min(agree) > 0.7
    found, wanted, dense = (m(**inputs)[0] for m in (pruned, other, model))
    assert (found - dense).norm() < 1.3 * (wanted - dense).norm()


def test_masks_are_those_of_the_graph_where_blocks_have_one_weight(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.Tanh()))).eval()
    batches = [(torch.randn(20, 8),) for _ in range(3)]
    method, walked = SparseGPTSparsifier(), SparseGPTSparsifier()
    _, report = prune(copy.deepcopy(model), method, batches, "2:4")
    assert report.reason == "no graph (CaptureError), 5 blocks of Linear in turn"
    monkeypatch.undo()
    _, expected = prune(model, walked, batches, "2:4")
    assert list(report) == list(expected)
    for fqn in report:
        assert torch.equal(method.get_mask(fqn), walked.get_mask(fqn))
        assert torch.allclose(method.get_data(fqn), walked.get_data(fqn), atol=1e-4)


def test_what_pruning_took_from_the_inputs_of_a_later_block_goes_first():
    """Half of the rows of one layer are gone, then half of each row of the next: the same half."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4))).eval()
    batches = [(torch.randn(100, 16),) for _ in range(2)]
    rows = SparsityMapping().set_module_name("0", "rows 50%").set_module_name("2", "rows 50%")
    mapping = copy.deepcopy(rows).set_global("unstructured:out 50%")
    (x,) = batches[0]
    errors = []
    for sequential in (True, False):
        method, fewer = SparseGPTSparsifier(), SparseGPTSparsifier()
        pruned, _ = prune(copy.deepcopy(model), method, batches, mapping, sequential=sequential)
        least, _ = prune(copy.deepcopy(model), fewer, batches, rows, sequential=sequential)
        errors.append(float((pruned(x) - least(x)).norm() / least(x).norm()))
    assert errors[0] < 1e-3
    assert errors[1] > 0.1


def test_a_block_that_is_used_again_later_waits_for_it():
    model, batches = stack(again=True)
    dense, method = copy.deepcopy(model), Recorded()
    _, report = prune(model, method, batches)
    names = list(report)
    assert names.index("layers.3.down.weight") < names.index("layers.1.up.weight")
    assert report["layers.1.up.weight"].tokens == 160
    assert report["layers.2.up.weight"].tokens == 80
    assert dense.layers[1].up.weight.shape == (24, 12)


def test_tied_and_skipped_weights():
    class Skips(nn.Module):
        """Leaves out a layer for some data; two layers share a weight, the table is the head."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.layers = nn.ModuleList([Layer(8) for _ in range(3)])
            self.layers[2].up.weight = self.layers[0].up.weight
            self.never = nn.Linear(8, 8)

        def forward(self, tokens):
            x = self.table(tokens)
            for number, layer in enumerate(self.layers):
                if number != 1 or int(tokens[0, 0]):
                    x = layer(x)
            return x @ self.table.weight.t()

    torch.manual_seed(0)
    model = Skips().eval()
    batches = [(torch.full((2, 5), n),) for n in (0, 3)]
    _, report = prune(model, TinyWanda(), batches)
    assert list(report) == [
        *("layers.0.down.weight", "layers.2.down.weight", "layers.0.up.weight"),
        *("layers.1.up.weight", "layers.1.down.weight", "table.weight"),
    ] or set(report) == {
        *(f"layers.{n}.down.weight" for n in range(3)),
        *("layers.0.up.weight", "layers.1.up.weight", "table.weight"),
    }
    assert [report[f"layers.{n}.down.weight"].tokens for n in range(3)] == [20, 10, 20]
    assert report["layers.0.up.weight"].tokens == 40
    assert report["table.weight"].tokens == 20
    assert report.dense["never.weight"] == "no input of it was seen"


def test_biases_and_resuming():
    model, batches = stack()
    whole = copy.deepcopy(model)
    prune(whole, TinyWanda(), batches, correct_bias=True)
    assert not torch.equal(whole.layers[3].up.bias, model.layers[3].up.bias)
    sparsifier = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        prune(model, sparsifier, batches, correct_bias=True)
    assert sparsifier.names == ["before.weight", "layers.0.up.weight"]
    sparsifier.left = 99
    _, report = prune(model, sparsifier, batches, correct_bias=True)
    assert list(report)[:2] == ["layers.0.down.weight", "layers.1.up.weight"]
    file = io.BytesIO()
    torch.save(dense_state_dict(model), file)
    assert torch.equal(model.before.weight, whole.before.weight)
    assert not parametrize.is_parametrized(model.before, "bias")


def test_measuring_rules_look_at_blocks_in_turn():
    model, batches = stack()
    method = SparseGPTSparsifier()
    rule = fxs.pruning.allocation.LeastError()
    _, report = prune(model, method, batches, "unstructured 50%", allocation=rule)
    total = sum(method.get_mask(fqn).numel() for fqn in report)
    assert sum(int((~method.get_mask(fqn)).sum()) for fqn in report) == round(total / 2)
    assert report.sequential


def test_blocks_are_found_from_the_outside_in():
    recommender, _ = make("recommender")
    found = find_blocks(recommender, recommender.parameters())
    assert describe(found) == "4 blocks of Linear and 3 blocks of EmbeddingBag"
    experts = nn.ModuleList([nn.ModuleList([Layer(4), Layer(4)]) for _ in range(3)])
    assert describe(find_blocks(experts, experts.parameters())) == "6 blocks of Layer"
    assert find_blocks(experts, []) == []
    alone = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    assert find_blocks(alone, alone.parameters()) == []
    model, _ = stack()
    fresh = fxs.WeightNormSparsifier()
    fresh.prepare(model, [{"tensor_fqn": "layers.0.up.weight"}])
    assert describe(find_blocks(model, model.parameters())) == "4 blocks of Layer"


def test_models_may_catch_every_exception():
    class Catches(Stack):
        def forward(self, x, gain=None):
            try:
                return super().forward(x, gain)
            except Exception:
                return x

    torch.manual_seed(0)
    model = Catches().eval()
    whole = Stack().eval()
    whole.load_state_dict(model.state_dict())
    batches = stack()[1]
    _, report = prune(model, TinyWanda(), batches)
    _, expected = prune(whole, TinyWanda(), batches)
    assert list(report) == list(expected)
    assert torch.equal(model(**batches[0]), whole(**batches[0]))


def test_blocks_that_are_not_called_as_modules():
    class Reads(Stack):
        def forward(self, x, gain=None):
            for layer in self.layers:
                x = layer.forward(x, gain=gain)
            return x

    torch.manual_seed(0)
    model, method, other = Reads().eval(), Recorded(), Recorded()
    batches = stack()[1]
    _, expected = prune(copy.deepcopy(model), other, batches, sequential=False)
    _, report = prune(model, method, batches)
    assert report.reason == "no graph (CaptureError), the running model was observed"
    assert not report.sequential
    for found, wanted in zip(method.grams, other.grams, strict=True):
        assert torch.equal(found, wanted)
