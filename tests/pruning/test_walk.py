"""The walk: sequential statistics, shapes, and what is undisturbed by it."""

import copy
import operator

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity import prune
from fx_sparsity.pruning import CalibrationError
from tests.coverage import architectures
from tests.models import make, make_bert
from tests.pruning.tiny_methods import (
    Everything,
    LeastSquares,
    Recorded,
    RecordedSquares,
    TinyWanda,
)


class Deep(nn.Module):
    """Layers one after another, with dropout and a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(4)])
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        for layer in self.layers:
            x = self.drop(layer(x).relu()) + x
        return x


def inputs_of(model, modules, batches):
    """FQN of a weight -> inputs of its module over all batches, float64, by hooks: [tokens, in]."""
    seen = {}

    def hook(name):
        return lambda module, args: seen.setdefault(name, []).append(
            args[0].detach().double().flatten(0, -2)
        )

    handles = [m.register_forward_pre_hook(hook(f"{n}.weight")) for n, m in modules.items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(*batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


def matmul_modules(model):
    kinds = ("Linear", "Conv1D", "ParametrizedLinear", "ParametrizedConv1D")
    found = {n: m for n, m in model.named_modules() if type(m).__name__ in kinds}
    assert found
    return found


def build(name):
    if name == "bert":
        model, inputs = make_bert()
        return model, [inputs, {**inputs, "input_ids": torch.randint(64, (2, 8))}]
    model, _, inputs = architectures.make(name)
    return model, [inputs, {"input_ids": torch.randint(3, 512, (2, 16))}]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_statistics_are_those_that_hooks_see(name, sequential):
    """Sequential ones in the pruned model, whose layers all came after what they depend on.

    But for a table that is the head, too: it is pruned last.
    """
    model, batches = build(name)
    mapping = fxs.SparsityMapping().set_global("unstructured 50%")
    if name == "gpt2":
        mapping.set_module_name("transformer.wte", None)
    dense = copy.deepcopy(model)
    method = Recorded()
    _, report = prune(model, method, batches, mapping, sequential=sequential)
    reference = model if sequential else dense
    seen = inputs_of(reference, matmul_modules(reference), batches)
    checked = 0
    for (fqn, pruned), gram in zip(report.items(), method.grams, strict=True):
        if (x := seen.get(fqn)) is None:
            continue
        expected = x.T @ x
        scale = float(expected.abs().max())
        assert torch.allclose(gram[0].double(), expected, rtol=1e-3, atol=1e-5 * scale), fqn
        assert pruned.tokens == len(x)
        checked += 1
    assert checked == len(matmul_modules(model)) - (name == "gpt2")


def test_later_layers_see_the_pruned_ones():
    torch.manual_seed(0)
    model, batches = Deep().eval(), [(torch.randn(20, 12),)]
    dense = copy.deepcopy(model)
    grams = {}
    for sequential in (True, False):
        method = Recorded()
        prune(copy.deepcopy(model), method, batches, sequential=sequential)
        grams[sequential] = method.grams
    assert torch.equal(grams[True][0], grams[False][0])
    x = inputs_of(dense, matmul_modules(dense), batches)["layers.1.weight"]
    assert torch.allclose(grams[False][1][0].double(), x.T @ x, rtol=1e-4)
    assert not torch.allclose(grams[True][1][0].double(), x.T @ x, rtol=1e-2)


def test_updates_are_seen_by_later_layers():
    torch.manual_seed(0)
    model, batches = Deep().eval(), [(torch.randn(40, 12),)]
    masks_alone, updated = copy.deepcopy(model), RecordedSquares()
    prune(model, updated, batches)
    x = inputs_of(model, matmul_modules(model), batches)["layers.2.weight"]
    assert torch.allclose(updated.grams[2][0].double(), x.T @ x, rtol=1e-4, atol=1e-4)
    magnitude = Recorded()
    prune(masks_alone, magnitude, batches)
    assert not torch.allclose(magnitude.grams[2], updated.grams[2], rtol=1e-2)


@pytest.mark.parametrize("name", ["recommender", "convnet", "tied", "bare", "sequential"])
def test_the_graph_of_the_pruned_model_gives_what_the_model_gives(name):
    model, inputs = make(name)
    before = model(*inputs)
    prune(model, LeastSquares(), [inputs])
    after = model(*inputs)
    program = torch.export.export(model, inputs, strict=False)
    assert torch.allclose(program.module()(*inputs), after)
    assert not torch.allclose(before, after)
    plain, record = fxs.squash(model, next_sparsifier(model))
    assert torch.equal(plain(*inputs), after)


def next_sparsifier(model):
    """A fresh sparsifier that takes over the masks that are on a model."""
    sparsifier = fxs.WeightNormSparsifier()
    masked = [n for n, m in model.named_modules() if isinstance(m, fxs.Mask)]
    fqns = dict.fromkeys(n.replace("parametrizations.", "").rpartition(".")[0] for n in masked)
    sparsifier.prepare(model, [{"tensor_fqn": fqn} for fqn in fqns])
    return sparsifier


def grams_of(model, batches, **options):
    method = Recorded()
    _, report = prune(copy.deepcopy(model), method, batches, **options)
    return method.grams, report


class Reshaping(nn.Module):
    """Branches by the parity of its input's size, so that no one graph serves all sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.a(x)
        if x.shape[0] % 2:
            x = x.relu()
        return self.b(x)


class Swapping(Reshaping):
    """Meets its weights in another order by the parity of its input's size."""

    def forward(self, x):
        return self.a(self.b(x)) if x.shape[0] % 2 else self.b(self.a(x))


@pytest.mark.parametrize(("kind", "graphs"), [(Deep, 1), (Reshaping, 2)])
def test_batches_of_any_shape_sum_up(kind, graphs):
    torch.manual_seed(0)
    model = kind().eval()
    width = model(torch.randn(1, 12 if kind is Deep else 6)).shape[-1]
    batches = [(torch.randn(size, width),) for size in (4, 7, 4, 10)]
    method = Recorded()
    _, report = prune(model, method, batches)
    assert report.sequential
    assert report.reason == ("1 graph" if graphs == 1 else "2 graphs")
    seen = inputs_of(model, matmul_modules(model), batches)
    for fqn, gram in zip(report, method.grams, strict=True):
        x = seen[fqn]
        assert report[fqn].tokens == 25
        assert torch.allclose(gram[0].double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_batches_of_other_nesting_take_a_graph_of_their_own():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, scale=None, twice=False):
            return self.a(x if scale is None else x * scale * (1 + twice))

    method = Recorded()
    x = torch.randn(3, 4)
    one = torch.tensor(1.0)
    batches = [
        *({"x": x, "scale": one * 2, "twice": False}, {"x": x, "scale": None, "twice": False}),
        *({"x": x, "scale": one, "twice": True}, x),
    ]
    _, report = prune(Optional(), method, batches)
    assert report.reason == "4 graphs"
    assert report.sequential
    assert torch.allclose(method.grams[0][0], 10 * x.T @ x, rtol=1e-4)


def test_graphs_that_meet_weights_in_other_orders_are_refused():
    model = Swapping()
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(4, 6),), (torch.randn(5, 6),)]
    with pytest.raises(CalibrationError, match="batches 0 and 1 take graphs that use"):
        prune(model, TinyWanda(), batches)
    assert not any("parametriz" in name for name, _ in model.named_modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dynamic_shapes_are_taken_as_given():
    model = Deep().eval()
    batches = [(torch.randn(size, 12),) for size in (4, 7)]
    _, report = prune(
        model, TinyWanda(), batches, dynamic_shapes=({0: torch.export.Dim("rows", min=2)},)
    )
    assert report.reason == "1 graph"


def test_nothing_else_is_disturbed():
    torch.manual_seed(0)
    model = Deep().train()
    model.layers[2].eval()
    model.layers[0].weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    prune(model, TinyWanda(), [(torch.randn(9, 12, generator=torch.Generator()),)])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert all(model.get_submodule(name).training == mode for name, mode in modes.items())
    assert not model.layers[0].parametrizations.weight.original.requires_grad
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_values_that_a_model_writes_into_are_not_shared_between_batches():
    class Scatter(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            total = torch.zeros(3, 4)
            total.index_add_(0, torch.arange(3), self.a(x))
            return self.b(total)

    torch.manual_seed(0)
    model, batches = Scatter(), [(torch.randn(3, 4),) for _ in range(3)]
    method = Recorded()
    prune(model, method, batches)
    x = inputs_of(model, {"b": model.b}, batches)["b.weight"]
    assert torch.allclose(method.grams[1][0].double(), x.T @ x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_calibrated_in_single(dtype):
    torch.manual_seed(0)
    model = Deep().eval().to(dtype)
    x = (torch.randn(30, 12) * 200).to(dtype)
    method = Everything()
    prune(model, method, [(x,)])
    weight, stats, _ = method.shown[0]
    assert weight.dtype == stats.gram.dtype == stats.squares.dtype == torch.float32
    assert torch.allclose(stats.gram[0].double(), x.double().T @ x.double(), rtol=1e-5)
    assert model.layers[0].weight.dtype == dtype


def test_what_lives_is_what_is_needed_later(monkeypatch):
    """Of all batches only what crosses a stop: here, one activation a batch."""
    from fx_sparsity.pruning import walk

    model, batches = Deep().eval(), [(torch.randn(5, 12),) for _ in range(3)]
    lives = []
    plain = walk.Walk.advance

    def watched(self, fqn):
        plain(self, fqn)
        lives.append([len(values) for values in self._values])

    monkeypatch.setattr(walk.Walk, "advance", watched)
    prune(model, TinyWanda(), batches)
    assert lives == [[1, 1, 1]] * 4


def test_weights_inside_a_subgraph_are_left_dense():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.b(x), lambda x: x + 1, (self.a(x),))

    _, report = prune(Conditional(), TinyWanda(), [(torch.randn(3, 4),)])
    assert list(report) == ["a.weight"]
    assert report.dense == {"b.weight": "used in a subgraph, whose inputs are not seen"}


class Blocks(nn.Module):
    """Layers in blocks, one within another, and an output that leaves one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(12, 12) for _ in range(4))
        self.scale = nn.Parameter(torch.rand(12))

    def forward(self, x):
        x = self.a(x)
        with torch.no_grad():
            y, same = self.b(x).relu(), x
        with torch.autocast("cpu", torch.bfloat16):
            x = self.c(x * self.scale) + same
            with torch.no_grad():
                z = self.d(x).relu()
            with torch.autocast("cpu", enabled=False):
                z = self.a(x.float()) + z
        return x + y + z


def test_blocks_without_gradients_or_with_autocasting_are_opened():
    torch.manual_seed(0)
    model, batches = Blocks().eval(), [(torch.randn(20, 12),) for _ in range(2)]
    seen = inputs_of(model, matmul_modules(model), batches)
    method = Recorded()
    _, report = prune(model, method, batches, sequential=False)
    assert set(report) == {"a.weight", "b.weight", "c.weight", "d.weight"}
    assert report.dense == {}
    for fqn, gram in zip(report, method.grams, strict=True):
        x = seen[fqn]
        assert report[fqn].tokens == len(x)
        assert torch.allclose(gram[0].double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_opened_blocks_give_what_the_model_gives():
    """Node by node, to the bit: the casts are those of the model's own blocks."""
    from fx_sparsity.graph.context_blocks import run_node
    from fx_sparsity.pruning.batches import capture_graphs as capture
    from fx_sparsity.pruning.batches import read_batches

    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(20, 12)
    (captured,) = capture(model, read_batches(model, [(x,)]))
    values = {}
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(captured.graph)
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = run_node(node, args, kwargs)
    ((result,),) = captured.graph.graph.output_node().args
    assert torch.equal(values[result], model(x))


def test_conditions_inside_blocks_stay():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                x = self.a(x)
                return torch.cond(x.sum() > 0, lambda x: self.b(x), lambda x: x + 1, (x,))

    _, report = prune(Conditional(), TinyWanda(), [(torch.randn(3, 4),)])
    assert list(report) == ["a.weight"]
    assert report.dense == {"b.weight": "used in a subgraph, whose inputs are not seen"}


def test_values_that_are_written_into_are_not_taken_for_the_same():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + 0
            y = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    x, method = torch.randn(9, 4), Recorded()
    prune(InPlace(), method, [(x,)])
    assert torch.allclose(method.grams[0][0], x.T @ x, rtol=1e-4)
    assert torch.allclose(method.grams[1][0], 4 * x.T @ x, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_a_cpu():
    torch.manual_seed(0)
    model, batches = Deep().eval(), [(torch.randn(size, 12),) for size in (30, 40)]
    on_gpu = copy.deepcopy(model).cuda()
    method, other = RecordedSquares(), RecordedSquares()
    prune(model, method, batches)
    prune(on_gpu, other, [(x.cuda(),) for (x,) in batches])
    for found, expected in zip(other.grams, method.grams, strict=True):
        assert found.is_cuda
        assert torch.allclose(found.cpu(), expected, rtol=1e-3, atol=1e-3)
