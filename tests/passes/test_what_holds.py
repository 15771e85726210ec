"""The table of `docs/passes.md` is what holds: every cell is run, and compared with eager execution."""

import contextlib
import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._functorch import config as aot_config
from torch._inductor.compile_fx import compile_fx

import fx_sparsity as fxs
from fx_sparsity import passes
from fx_sparsity.lowering import compile_backend as compiling

pytestmark = pytest.mark.exhaustive

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().partition("## What holds")[2].splitlines()
    if line.startswith("|")
]
WAYS, ROWS = TABLE[0][1:], {row[0]: row[1:] for row in TABLE[2:] if "not run" not in row}
MAPPING = fxs.SparsityMapping().set_global("unstructured 60%")
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@torch.compiler.nested_compile_region
def region(layer, x):
    return layer.b(layer.a(x).relu())


class Layer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(32, 64), nn.Linear(64, 32), kind

    def forward(self, x):
        if self.kind == "region":
            return region(self, x)
        x = self.a(x).relu()
        if self.kind == "breaks":
            torch._dynamo.graph_break()
        return self.b(x)


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Layer(kind), Layer(kind)

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


def pruned(model):
    """The oracle."""
    model, sparsifier = copy.deepcopy(model), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (X,), MAPPING)
    sparsifier.step()
    return fxs.squash(model, sparsifier)[0]


def traced_alone(graph, inputs, **options):
    """Inductor up to where it would generate code."""
    inner = lambda gm, *args, **kwargs: gm.forward  # noqa: E731
    with aot_config.patch(enable_autograd_cache=False):
        return compile_fx(graph, inputs, inner_compile=inner, config_patches=options)


def live(model, compiled):
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (X,), MAPPING)
    call = compiled(model, backend="aot_eager")
    call(X)
    sparsifier.step()
    return call


def squashed(model, compiled):
    return compiled(pruned(model), backend="aot_eager")


def lowered(model, compiled):
    return compiled(fxs.lower(pruned(model), (X,), "always")[0], backend="aot_eager")


def by_backend(model, compiled):
    options = {"mapping": MAPPING, "policy": "always", "then": "aot_eager"}
    return compiled(model, backend=compiling.backend, options=options)


def in_inductor(model, compiled):
    masking = passes.InductorPrepare(model, fxs.WeightNormSparsifier(), MAPPING)
    call = compiled(model, backend=functools.partial(traced_alone, **masking.options))
    call(X)
    masking.sparsifier.step()
    return call


MAKE = dict(zip(WAYS, (live, squashed, lowered, by_backend, in_inductor), strict=True))


def layers(model, **options):
    for layer in (model.first, model.second):
        layer.compile(**options)
    return model


SETTINGS = {
    "`fullgraph=True`": ("plain", functools.partial(torch.compile, fullgraph=True)),
    "graph breaks": ("breaks", torch.compile),
    "`dynamic=True`": ("plain", functools.partial(torch.compile, dynamic=True)),
    "each layer compiled by itself": ("plain", layers),
    "`nested_compile_region`": ("region", functools.partial(torch.compile, fullgraph=True)),
    "gradients": ("plain", torch.compile),
}


def agrees(call, oracle, numbers=(5, 3, 9)):
    for number in numbers:
        x = torch.randn(number, 32, generator=torch.Generator().manual_seed(number))
        torch.testing.assert_close(call(x), oracle(x), rtol=1e-4, atol=1e-5)


def trains(call, oracle, model):
    """A mask that is live stops the gradient of what it masks; what is squashed has all of it."""
    call(X).square().sum().backward()
    oracle(X).square().sum().backward()
    masked = any(parameter.grad is not None for parameter in model.parameters())
    found = dict((model if masked else call).named_parameters())
    for fqn, parameter in oracle.named_parameters():
        owner, _, attribute = fqn.rpartition(".")
        names = (fqn, f"_orig_mod.{fqn}", f"{owner}.parametrizations.{attribute}.original")
        (grad,) = (found[name].grad for name in names if name in found)
        kept = parameter != 0 if masked and parameter.ndim == 2 else True
        torch.testing.assert_close(grad, parameter.grad * kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", ROWS)
def test_a_cell(setting, way):
    torch._dynamo.reset()
    kind, compiled = SETTINGS.get(
        setting, ("plain", functools.partial(torch.compile, dynamic=True))
    )
    stance = setting.split("`")[1] if setting.startswith("stance") else "default"
    holds = ROWS[setting][WAYS.index(way)].startswith("yes")
    model = Model(kind).eval()
    oracle = pruned(model)
    grad = torch.enable_grad() if setting == "gradients" else torch.no_grad()
    with grad, contextlib.nullcontext() if holds else pytest.raises(Exception):  # noqa: PT011
        call = MAKE[way](model, compiled)
        call(X)
        with torch.compiler.set_stance(stance):
            if setting == "gradients":
                trains(call, oracle, model)
            else:
                agrees(call, oracle)
