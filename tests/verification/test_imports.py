"""What verification says of a model is the same, whatever else the process has imported."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fx_sparsity as fxs
from fx_sparsity.quantization import get_backend
from fx_sparsity.verification import read_weights


class Scaled(nn.Module):
    """A pair of low rank, of which the rows have a length of their own, as in DoRA."""

    def __init__(self):
        super().__init__()
        self.A, self.B = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        self.length = nn.Parameter(torch.rand(16, 1) + 1)

    def forward(self, x):
        return F.linear(self.A(x), self.B.weight * self.length)


def exported(model, inputs):
    return torch.export.export(model, inputs)


def program(model, inputs):
    return exported(model, inputs).module()


def codes(model, inputs):
    sparse = get_backend("pt2e").quantize(model, inputs, fxs.find_weights(model, inputs)).model
    for node in sparse.graph.nodes:  # nothing but what the graph does tells
        node.meta.pop("custom", None)
    return sparse


@pytest.mark.parametrize("imported", [True, False])
@pytest.mark.parametrize("form", [exported, program])
def test_floats_that_a_graph_computes_from(form, imported, monkeypatch):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model, inputs = Scaled(), (torch.randn(2, 16),)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, {"module_name": dict.fromkeys("AB", "unstructured 50%")})
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    if not imported:
        monkeypatch.delitem(sys.modules, "torchao")
    found = fxs.verify(form(model, inputs), record)
    assert {row.fqn: row.faults for row in found} == {"A.weight": (), "B.weight": ()}


@pytest.mark.parametrize("imported", [True, False])
def test_codes_that_a_graph_reads(imported, monkeypatch):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = codes(
        nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), (torch.randn(2, 16),)
    )
    if not imported:
        monkeypatch.delitem(sys.modules, "torchao")
    assert sorted(w.dtype for w in read_weights(model) if w.quantized) == ["int8"] * 2
