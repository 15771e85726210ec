"""Dynamo lets one graph serve all modules of a class: masks and kernels of one must not serve another."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fx_sparsity as fxs
from fx_sparsity.lowering.compile_backend import backend

HALF = fxs.SparsityMapping().set_global("unstructured 60%")
MANY = 9  # beyond Dynamo's limit of recompilations


class Layer(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.a, self.b, self.breaks = nn.Linear(16, 32), nn.Linear(32, 16), breaks

    def forward(self, x):
        x = self.a(x).relu()
        if self.breaks:
            torch._dynamo.graph_break()
        return self.b(x)


class Layers(nn.Module):
    def __init__(self, breaks, number=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(breaks) for _ in range(number))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def masked(model):
    """The oracle: masks on the modules, run eagerly."""
    model, sparsifier = copy.deepcopy(model), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (X,), HALF)
    sparsifier.step()
    return model


def compile_by(way, model, **options):
    """`model` as a whole with breaks, or layer by layer."""
    torch._dynamo.reset()
    if way == "breaks":
        return torch.compile(model, **options)
    for layer in model.layers:
        layer.compile(**options)
    return model


@pytest.mark.parametrize(("way", "number"), [("breaks", 2), ("regional", MANY)])
def test_the_backend_compiles_each_layer_for_its_own_weights(way, number):
    model = Layers(way == "breaks", number).eval()
    expected = masked(model)
    reports = []
    options = {"policy": "always", "report": reports.append, "then": "eager", "mapping": HALF}
    with torch.no_grad():
        compiled = compile_by(way, model, backend=backend, options=options)
        torch.testing.assert_close(compiled(X), expected(X))
        layer = model.layers[0]
        layer.a.weight = nn.Parameter(layer.a.weight.flip(1))  # another tensor at the same place
        torch.testing.assert_close(compiled(X), masked(model)(X))
    assert sum(len(report.lowered) for report in reports) >= 2 * number


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("way", ["breaks", "regional"])
def test_masks_of_a_layer_are_that_of_its_own_weights(way, below):
    model, sparsifier = Layers(way == "breaks").eval(), fxs.WeightNormSparsifier()
    expected = masked(model)

    def mine(graph, received):
        fxs.prepare(graph, sparsifier, None if below else received, HALF, model=model)
        return graph.forward

    with torch.no_grad():
        each = aot_autograd(fw_compiler=mine) if below else mine
        compiled = compile_by(way, model, backend=each)
        compiled(X)
        sparsifier.step()
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(X), expected(X))
    assert len(sparsifier.names) == 4


@torch.compiler.nested_compile_region
def region(layer, x):
    return layer.b(layer.a(x).relu())


class Regions(Layers):
    def forward(self, x):
        for layer in self.layers:
            x = x + region(layer, x)
        return x


def test_each_call_of_a_region_has_kernels_of_its_own():
    """Dynamo calls one subgraph for all of them."""
    torch._dynamo.reset()
    model, reports = Regions(False, 3).eval(), []
    options = {"mapping": HALF, "policy": "always", "then": "aot_eager", "report": reports.append}
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), masked(model)(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(X[:3]), masked(model)(X[:3]), rtol=1e-4, atol=1e-5)
    assert all(len(report.lowered) == 6 for report in reports)
    assert reports
