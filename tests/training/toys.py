"""A linear regression whose gradient one can write down, and masks by sorting."""

import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.training import Sparsify

ROWS, COLUMNS = 8, 16


class Toy:
    """`mean((x w - y)^2) / 2` in float64; `gradient` is that of w, whatever mask is on it."""

    def __init__(self, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(64, COLUMNS, dtype=torch.float64, generator=draw)
        self.y = torch.randn(64, ROWS, dtype=torch.float64, generator=draw)
        self.start = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=draw)

    def model(self):
        layer = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float64)
        layer.weight.data.copy_(self.start)
        return nn.Sequential(layer)

    def loss(self, model):
        return (model(self.x) - self.y).square().mean() / 2

    def gradient(self, weight):
        return (self.x @ weight.T - self.y).T @ self.x / self.y.numel()


def prepared(method, config="unstructured 75%", toy=None, model=None):
    toy = toy or Toy()
    model = toy.model() if model is None else model
    fxs.prepare(model, method, (toy.x[:2],), config)
    return toy, model


def original(model):
    return model[0].parametrizations.weight.original


def train(toy, model, method, optimizer, steps, schedule=None, run=None):
    """What lies beneath the mask and the mask, after the start and after every step."""
    run = run or Sparsify(model, method, optimizer, schedule)
    seen = [(original(model).detach().clone(), method.keep("0.weight").clone())]
    for _ in range(steps):
        optimizer.zero_grad()
        toy.loss(model).backward()
        optimizer.step()
        seen.append((original(model).detach().clone(), method.keep("0.weight").clone()))
    return seen


def lowest(scores, count, among=None):
    """True for the `count` lowest, the first among equals."""
    scores = scores.flatten() if among is None else scores.where(among, torch.inf).flatten()
    order = sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view(ROWS, COLUMNS)


def two_four(scores):
    """Keeps the two highest of every four along a row."""
    keep = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    for row in range(ROWS):
        for start in range(0, COLUMNS, 4):
            group = range(start, start + 4)
            for i in sorted(group, key=lambda i: (float(scores[row, i]), i))[2:]:
                keep[row, i] = True
    return keep


def assert_same(seen, wanted):
    assert len(seen) == len(wanted)
    for step, ((weight, mask), (expected, keep)) in enumerate(zip(seen, wanted, strict=True)):
        assert torch.equal(mask, keep), step
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)
