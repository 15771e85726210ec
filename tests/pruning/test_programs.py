"""Graphs and programs of `torch.export`: pruned like the module that they came from."""

import copy
import io

import pytest
import torch
from torch import fx, nn

import fx_sparsity as fxs
from fx_sparsity import SparsityMapping, prune
from fx_sparsity.graph import InputError
from fx_sparsity.sparsifier import MaskError, dense_state_dict
from tests.models import make
from tests.pruning.test_prune import Interrupted, mlp
from tests.pruning.tiny_methods import LeastSquares, TinyWanda
from tests.sparsifier.test_base import assert_unchanged, snapshot


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(64, (2, 8))}


def model_and_batches(name):
    """A model, and batches of different sizes where it has dynamic ones."""
    model, inputs = llama() if name == "llama" else make(name)
    leaves = torch.utils._pytree.tree_map(lambda x: x.flip(-1), inputs)
    return model, [inputs, leaves]


def exported(model, batch):
    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
    return torch.export.export(model, args, kwargs)


def call(model, batch):
    found = model(**batch) if isinstance(batch, dict) else model(*batch)
    return found.logits if hasattr(found, "logits") else found


def assert_same(report, method, expected, reference):
    assert list(report) == list(expected)
    for fqn, row in report.items():
        other = expected[fqn]
        assert torch.equal(method.get_mask(fqn), reference.get_mask(fqn)), fqn
        assert torch.equal(method.get_tensor(fqn), reference.get_tensor(fqn)), fqn
        assert (row.pattern, row.level, row.tokens) == (other.pattern, other.level, other.tokens)
        assert row.error == other.error
    assert dict(report.dense) == dict(expected.dense)
    assert (report.sequential, report.batches) == (True, 2)


NAMES = ["recommender", "convnet", "tied", "bare", "sequential", "llama"]
METHODS = [TinyWanda, LeastSquares, fxs.SparseGPTSparsifier]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make_method", METHODS)
def test_graphs_are_pruned_like_their_modules(name, make_method):
    model, batches = model_and_batches(name)
    graph = exported(copy.deepcopy(model), batches[0]).module()
    reference, method = make_method(), make_method()
    pruned, expected = prune(model, reference, batches, "unstructured 50%")
    same, report = prune(graph, method, batches, "unstructured 50%")
    assert same is graph
    assert report.reason == "its own graph"
    assert_same(report, method, expected, reference)
    for batch in batches:
        assert torch.equal(call(graph, batch), call(pruned, batch))
    graph, record = fxs.squash(graph, method)
    assert not any("where" in str(node.target) for node in graph.graph.nodes) or name == "llama"
    assert not hasattr(graph, "sparsity_masks")
    fxs.verify(graph, record).raise_if_lost()
    assert torch.allclose(call(graph, batches[0]), call(pruned, batches[0]), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_programs_are_pruned_in_a_copy(name):
    model, batches = model_and_batches(name)
    program = exported(model, batches[0])
    before, graph_before = snapshot(model), str(program.graph)
    reference, method = LeastSquares(), LeastSquares()
    whole, expected = prune(copy.deepcopy(model), reference, batches)
    pruned, report = prune(program, method, batches)
    assert_unchanged(model, before)
    assert str(program.graph) == graph_before
    assert all(program.state_dict[fqn] is p for fqn, p in model.named_parameters())
    assert isinstance(pruned, torch.export.ExportedProgram)
    assert_same(report, method, expected, reference)
    for batch in batches:
        assert torch.equal(call(pruned.module(), batch), call(whole, batch))
    plain, record = fxs.squash(pruned, method)
    assert str(plain.graph) == graph_before
    fxs.verify(plain, record).raise_if_lost()
    assert torch.allclose(call(plain.module(), batches[0]), call(whole, batches[0]), atol=1e-6)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["convnet", "bare", "llama"])
def test_decomposed_programs(name):
    model, batches = model_and_batches(name)
    program = exported(copy.deepcopy(model), batches[0]).run_decompositions()
    reference, method = TinyWanda(), TinyWanda()
    _, expected = prune(model, reference, batches)
    pruned, report = prune(program, method, batches)
    assert list(report) == list(expected)
    assert all(torch.equal(method.get_mask(f), reference.get_mask(f)) for f in report)


def test_saved_programs_with_ties():
    model, batches = model_and_batches("tied")
    file = io.BytesIO()
    torch.export.save(exported(model, batches[0]), file)
    file.seek(0)
    program = torch.export.load(file)
    reference, method = LeastSquares(), LeastSquares()
    whole, expected = prune(model, reference, batches)
    pruned, report = prune(program, method, batches)
    assert_same(report, method, expected, reference)
    assert torch.equal(call(pruned.module(), batches[0]), call(whole, batches[0]))


def test_biases_are_corrected():
    model, batches = mlp(3)
    program = torch.export.export(model, batches[0])
    graph = copy.deepcopy(program).module()
    before = snapshot(model)
    whole, _ = prune(copy.deepcopy(model), TinyWanda(), batches, correct_bias=True)
    prune(graph, TinyWanda(), batches, correct_bias=True)
    pruned, _ = prune(program, TinyWanda(), batches, correct_bias=True)
    assert_unchanged(model, before)
    (x,) = batches[0]
    assert torch.equal(graph(x), whole(x))
    assert torch.equal(pruned.module()(x), whole(x))
    assert not torch.equal(whole[0].bias, model[0].bias)


def test_batch_norms_are_measured_anew():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, affine=False)),
    ).eval()
    batches = [(torch.randn(3, 4, 8, 8) + shift,) for shift in range(3)]
    program = torch.export.export(model, batches[0])
    before = snapshot(model)
    whole, _ = prune(copy.deepcopy(model), TinyWanda(), batches, correct_bias=True)
    pruned, _ = prune(program, TinyWanda(), batches, correct_bias=True)
    assert_unchanged(model, before)
    for place in ("1", "4"):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            found, wanted = (m.get_buffer(f"{place}.{name}") for m in (pruned.module(), whole))
            assert torch.allclose(found, wanted), name
    assert torch.allclose(pruned.module()(*batches[0]), whole(*batches[0]), atol=1e-5)


def test_gradients_and_allocation():
    model, batches = mlp(3)
    graph = copy.deepcopy(torch.export.export(model, batches[0])).module()
    options = {
        "loss": lambda output, batch: output.square().mean(),
        "mapping": "unstructured 50%",
        "allocation": fxs.pruning.allocation.GlobalRanking(),
    }
    reference, method = (fxs.pruning.methods.TaylorSparsifier() for _ in range(2))
    _, expected = prune(model, reference, batches, **options)
    _, report = prune(graph, method, batches, **options)
    assert_same(report, method, expected, reference)


def test_dynamic_shapes_are_those_of_the_graph():
    model, _ = mlp(2)
    shapes = {"input": {0: torch.export.Dim("n", min=2, max=40)}}
    program = torch.export.export(model, (torch.randn(4, 8),), dynamic_shapes=shapes)
    batches = [(torch.randn(n, 8),) for n in (3, 7)]
    reference, method = TinyWanda(), TinyWanda()
    _, expected = prune(copy.deepcopy(model), reference, batches)
    _, report = prune(program, method, batches)
    assert_same(report, method, expected, reference)
    before = snapshot(model)
    for wrong, message in (
        ((torch.randn(50, 8),), "batch 1: the graph takes input.* float32"),
        ((torch.randn(3, 7),), r"batch 1: .* the batch is float32\[3, 7\]"),
        ((torch.randn(3, 8).double(),), "batch 1"),
        ((torch.randn(3, 8), torch.randn(3)), "batch 1"),
        ({"other": torch.randn(3, 8)}, "batch 1"),
    ):
        for subject in (program, program.module()):
            with pytest.raises(InputError, match=message):
                prune(subject, TinyWanda(), [batches[0], wrong])
    with pytest.raises(ValueError, match="a graph has the shapes that it was exported with"):
        prune(program, TinyWanda(), batches, dynamic_shapes=shapes)
    assert_unchanged(model, before)


class Options(nn.Module):
    """Positional, named and constant arguments."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, scale=None, *, twice=False):
        x = self.a(x) * scale
        return self.b(x) * (2 if twice else 1)


def test_arguments_go_by_the_names_of_the_export():
    torch.manual_seed(0)
    model, x = Options().eval(), torch.randn(5, 8)
    options = {"twice": True, "scale": torch.ones(8)}
    program = torch.export.export(model, (x,), options)
    batch = {"twice": True, "scale": torch.full((8,), 2.0), "x": x}
    reference, method = TinyWanda(), TinyWanda()
    _, expected = prune(copy.deepcopy(model), reference, [batch] * 2)
    assert expected.reason == "1 graph"
    _, report = prune(copy.deepcopy(program).module(), method, [batch] * 2)
    assert_same(report, method, expected, reference)
    with pytest.raises(InputError, match="twice True"):
        prune(program, TinyWanda(), [{**batch, "twice": False}])


@pytest.mark.parametrize("kind", ["graph", "program"])
def test_interrupted_pruning_goes_on(kind):
    model, batches = mlp(4)
    whole, dense = copy.deepcopy(model), copy.deepcopy(model)
    prune(whole, TinyWanda(), batches)
    program = torch.export.export(model, batches[0])
    subject = program if kind == "program" else program.module()
    sparsifier = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        prune(subject, sparsifier, batches)
    assert sparsifier.names == ["0.weight", "2.weight"]
    sparsifier.left = 9
    pruned, report = prune(subject, sparsifier, batches)
    assert list(report) == ["4.weight", "6.weight"]
    assert report.dense["0.weight"] == "pruned already by this sparsifier"
    result = pruned.module() if kind == "program" else pruned
    (x,) = batches[0]
    assert torch.equal(result(x), whole(x))
    plain, record = fxs.squash(pruned, sparsifier)
    assert sorted(record) == ["0.weight", "2.weight", "4.weight", "6.weight"]
    if kind == "program":
        assert_unchanged(model, snapshot(dense))


def test_a_saved_state_goes_on():
    model, batches = mlp(4)
    whole = copy.deepcopy(model)
    prune(whole, TinyWanda(), batches)
    program = torch.export.export(model, batches[0])
    graph, sparsifier = copy.deepcopy(program).module(), Interrupted()
    with pytest.raises(KeyboardInterrupt):
        prune(graph, sparsifier, batches)
    weights, state = dense_state_dict(graph), sparsifier.state_dict()
    fresh, resumed = copy.deepcopy(program).module(), TinyWanda()
    fresh.load_state_dict(weights)
    resumed.load_state_dict(state)
    _, report = prune(fresh, resumed, batches)
    assert list(report) == ["4.weight", "6.weight"]
    (x,) = batches[0]
    assert torch.equal(fresh(x), whole(x))
    assert not hasattr(fresh.get_submodule("0"), "parametrizations")


def test_masked_graphs_keep_their_masks():
    """Those of `prepare`, and those of an earlier call with another mapping."""
    model, batches = mlp(3)
    graph = copy.deepcopy(torch.export.export(model, batches[0])).module()
    method = TinyWanda()
    for name in ("2", "0"):
        mapping = SparsityMapping().set_module_name(name, "unstructured 50%")
        _, report = prune(graph, method, batches, mapping)
        assert list(report) == [f"{name}.weight"]
    assert sorted(method.names) == ["0.weight", "2.weight"]
    assert all(method.get_mask(name).float().mean() == 0.5 for name in method.names)
    other, plain = copy.deepcopy(torch.export.export(model, batches[0])).module(), TinyWanda()
    fresh = fxs.WeightNormSparsifier()
    fxs.prepare(other, fresh, mapping=SparsityMapping().set_module_name("0", "unstructured 50%"))
    prune(other, plain, batches, SparsityMapping().set_module_name("0", "unstructured 50%"))
    assert plain.get_mask("0.weight").float().mean() == 0.5
    assert len(other.graph.find_nodes(op="call_function", target=torch.ops.aten.where.self)) == 1


def test_programs_masked_by_prepare():
    model, batches = mlp(2)
    first = SparsityMapping().set_module_name("0", "rows 25%")
    fresh = fxs.WeightNormSparsifier()
    masked = fxs.prepare(torch.export.export(model, batches[0]), fresh, mapping=first)
    fresh.step()
    kept = fresh.get_mask("0.weight").clone()
    mapping, method = SparsityMapping().set_module_name("2", "unstructured 50%"), TinyWanda()
    pruned, report = prune(masked, method, batches, mapping)
    assert list(report) == ["2.weight"]
    assert torch.equal(fresh.get_mask("0.weight"), kept)
    (x,) = batches[0]
    hidden = nn.functional.linear(x, model[0].weight * kept, model[0].bias).relu()
    kept_weight = model[2].weight * method.get_mask("2.weight")
    wanted = nn.functional.linear(hidden, kept_weight, model[2].bias).relu()
    assert torch.allclose(pruned.module()(x), wanted, atol=1e-6)


def test_traced_graphs_are_captured():
    model, batches = mlp(3)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    reference, method = TinyWanda(), TinyWanda()
    _, expected = prune(model, reference, batches)
    _, report = prune(traced, method, batches)
    assert report.reason == "1 graph"
    assert_same(report, method, expected, reference)


def test_a_sparsifier_prunes_one_model():
    """Weights that it has pruned in one are not done in another."""
    model, batches = mlp(2)
    program, method = torch.export.export(model, batches[0]), TinyWanda()
    pruned, _ = prune(program, method, batches)
    before = snapshot(model)
    for other in (program, pruned, program.module(), model):
        with pytest.raises(MaskError, match="bound to another GraphModule; prune this model with"):
            prune(other, method, batches)
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match="needs no data"):
        prune(program, fxs.DataNormSparsifier(), batches)
