"""Lowered layers that feed one another, in graphs, programs and behind the compiler."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fx_sparsity import find_weights, lower

WIDTH = 64


def halved(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data[torch.rand(parameter.shape, generator=generator) < 0.6] = 0
    return model.eval().requires_grad_(False)


class Chain(nn.Sequential):
    """Three layers in a row, nothing between them."""

    def __init__(self):
        super().__init__(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))


class Residual(nn.Module):
    """A layer whose result is also added to that of the next."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.a(x)
        return x + self.b(x)


class Twice(nn.Module):
    """One layer called on its own result."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.layer(self.layer(x))


class Adapted(nn.Module):
    """A low-rank pair beside a layer, unmerged."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 16, bias=False), nn.Linear(16, WIDTH, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 2


class Products(nn.Module):
    """Matrix products in a row, by parameters of the model itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x):
        return (x @ self.a) @ self.b + F.linear(x, self.a)


class Stacked(nn.Module):
    """A stack of matrices in one product, after a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.stack = nn.Parameter(torch.randn(2, WIDTH, WIDTH))

    def forward(self, x):
        return torch.matmul(self.layer(x).unsqueeze(1), self.stack)


class Shared(nn.Module):
    """One result into two layers, and both into a third."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.left(x) * self.right(x))


KINDS = [Chain, Residual, Twice, Adapted, Products, Stacked, Shared]


def inputs(kind):
    torch.manual_seed(0)
    return torch.randn((3, 4, WIDTH) if kind is Stacked else (4, WIDTH))


def program_of(model, x):
    return lower(torch.export.export(model, (x,)), policy="always")[0].module()


def graph_of(model, x):
    graph = lower(torch.export.export(model, (x,)).module(), (x,), "always")[0]
    graph.graph.lint()
    return graph


def compiled(model, x):
    torch._dynamo.reset()
    return torch.compile(model, backend="fx_sparsity", options={"policy": "always"})


@pytest.mark.parametrize("way", [program_of, graph_of, compiled])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layers_that_feed_one_another(kind, way):
    torch.manual_seed(0)
    model, x = halved(kind()), inputs(kind)
    found = way(copy.deepcopy(model), x)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("way", [program_of, graph_of])
@torch.no_grad()
def test_quantized_layers_that_feed_one_another(way):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    model, x = halved(Chain()), inputs(Chain)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    expected = model(x)
    torch.testing.assert_close(way(model, x)(x), expected, rtol=1e-3, atol=1e-3)


def test_stacks_in_products_stay_dense_with_the_reason():
    model, x = halved(Stacked()), inputs(Stacked)
    _, report = lower(torch.export.export(model, (x,)), (x,), "always")
    assert report.lowered == ("layer.weight",)
    assert report.dense == {"stack": "its weight has 3 dimensions"}
    assert list(find_weights(model, (x,))) == ["layer.weight", "stack"]
