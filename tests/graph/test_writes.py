"""Writes in place: activations written into a tensor make it one, weights make it a weight."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fx_sparsity import find_weights
from fx_sparsity.graph import Reason
from fx_sparsity.graph.frontends import export_model
from tests.coverage.proof import Proof


def model_of(forward, **shapes):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(shape)))

    Model.forward = forward
    return Model()


def written_whole(self, x):
    h = torch.zeros(4, 8)
    h[1:] = x
    h += self.pos
    return h @ self.w


def written_through_a_view(self, x):
    h = torch.zeros(4, 8)
    view = h.view(2, 16)[1]
    h[1:].copy_(x)
    return (view.view(2, 8) + self.pos[:2]) @ self.w


def seen_by_an_older_view(self, x):
    h = torch.zeros(4, 8)
    older = h.t()
    h[1:] += x
    return (older + self.pos.t()).t() @ self.w


def a_copy_of_the_parameter(self, x):
    h = self.pos.clone()
    h[1:] = x
    return h @ self.w


def multiplied_in_place(self, x):
    h = torch.ones(4, 8)
    h[1:].mul_(x)
    return h.add_(self.pos) @ self.w


ACTIVATIONS = [
    written_whole,
    written_through_a_view,
    seen_by_an_older_view,
    a_copy_of_the_parameter,
    multiplied_in_place,
]


@pytest.mark.parametrize("forward", ACTIVATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("decomposed", [False, True])
def test_what_is_added_to_written_activations_is_no_weight(forward, decomposed):
    model, inputs = model_of(forward, pos=(4, 8), w=(8, 8)), (torch.randn(3, 8),)
    program = export_model(model, inputs)
    program = program.run_decompositions() if decomposed else program
    weights = find_weights(program)
    assert {site.fqn: site.roles for site in weights.sites} == {"w": ("in", "out")}
    (dense,) = weights.dense
    assert (dense.fqn, dense.reason) == ("pos", Reason.ADDED)
    proof = Proof(program.module(), inputs)
    proof.check(weights["w"])


def rows(self, x):
    w = torch.zeros(8, 8)
    w[:4] = self.a
    w[4:] = self.b
    return F.linear(x, w)


def columns(self, x):
    w = x.new_zeros(4, 16)
    w[:, :8].copy_(self.a)
    w[:, 8:] += self.b
    return torch.cat([x, x], 1) @ w.t()


def stacked(self, x):
    w = torch.empty(2, 8, 4)
    w[0] = self.a.t()
    w[1] = self.b.t()
    return torch.bmm(x.expand(2, 3, 8), w)


@pytest.mark.parametrize("forward", [rows, columns, stacked], ids=lambda f: f.__name__)
@pytest.mark.parametrize("decomposed", [False, True])
def test_parameters_written_into_a_buffer_are_parts_of_a_weight(forward, decomposed):
    model, inputs = model_of(forward, a=(4, 8), b=(4, 8)), (torch.randn(3, 8),)
    program = export_model(model, inputs)
    program = program.run_decompositions() if decomposed else program
    weights = find_weights(program)
    assert {site.fqn: site.roles for site in weights.sites} == dict.fromkeys("ab", ("out", "in"))
    # The oracle: an input that a zeroed column would read does not matter any more.
    with torch.no_grad():
        model.a[:, 2] = model.b[:, 2] = 0
    changed = inputs[0].clone()
    changed[:, 2] = 7
    assert torch.equal(model(*inputs), model(changed))


def test_a_trace_shows_writes_by_assignment():
    assert [
        (p.fqn, p.reason)
        for p in find_weights(
            fx.symbolic_trace(model_of(written_whole, pos=(4, 8), w=(8, 8)))
        ).dense
    ] == [("pos", Reason.ADDED)]


def test_a_parameter_that_is_overwritten_is_left_open():
    def forward(self, x):
        self.w.data[0] = x[0]
        return x @ self.w

    weights = find_weights(model_of(forward, w=(8, 8)), (torch.randn(3, 8),))
    assert "w" in weights or not weights.dense[0].reason.explained


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_whose_long_rows_are_shortened_stays_one(kind, decomposed):
    torch.manual_seed(0)
    model, inputs = kind(10, 8, max_norm=0.5), (torch.tensor([[1, 2, 3]]),)
    program = export_model(model, inputs)
    program = program.run_decompositions() if decomposed else program
    (site,) = find_weights(program).sites
    assert (site.fqn, site.roles, site.lost_zeros) == ("weight", ("row", "dim"), "")
    # The oracle: what is zero stays so when its row is shortened.
    with torch.no_grad():
        model.weight[:, ::2] = 0
    assert not model(*inputs)[..., ::2].any()
