"""What is done to a weight before it is used keeps the roles of the use; proved by execution."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

import fx_sparsity as fxs
from fx_sparsity.graph import MappingError
from fx_sparsity.graph.frontends import export_model
from tests.coverage.proof import Proof

OUT_IN, CONV = ("out", "in"), ("out", "in", "kernel", "kernel")
X, IMAGE, WIDE = (5, 8), (2, 8, 6, 6), (5, 16)
ORDER = torch.tensor([3, 0, 1, 2, 7, 4, 6, 5])


class Net(nn.Module):
    def __init__(self, forward, shape=(8, 8)):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(shape))
        self.register_buffer("p", ORDER)
        self.register_buffer("keep", torch.arange(8) % 4 != 3)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


# name -> (function, shapes of x and w, roles, axes whose order is not that of storage)
PATHS = {
    "columns": (lambda m, x: F.linear(x, m.w[:, m.p]), X, (8, 8), OUT_IN, (1,)),
    "rows": (lambda m, x: F.linear(x, m.w[m.p]), X, (8, 8), OUT_IN, (0,)),
    "kernels": (lambda m, x: F.conv2d(x, m.w[:, m.p]), IMAGE, (4, 8, 3, 3), CONV, (1,)),
    "chosen": (lambda m, x: F.linear(x, m.w[m.keep]), X, (8, 8), OUT_IN, (0,)),
    "index_select": (lambda m, x: x @ m.w.index_select(0, m.p), X, (8, 8), OUT_IN[::-1], (0,)),
    "gather": (
        lambda m, x: F.linear(x, m.w.gather(1, m.p.expand(6, 8))),
        *(X, (6, 8), OUT_IN, (1,)),
    ),
    "flip": (lambda m, x: F.linear(x, m.w.flip(1)), X, (6, 8), OUT_IN, (1,)),
    "flipped kernel": (lambda m, x: F.conv2d(x, m.w.flip(2, 3)), IMAGE, (4, 8, 3, 3), CONV, (2, 3)),
    "roll": (lambda m, x: F.linear(x, m.w.roll(1, 0)), X, (6, 8), OUT_IN, (0,)),
    "pad": (lambda m, x: F.linear(x, F.pad(m.w, (4, 4))), WIDE, (6, 8), OUT_IN, (1,)),
    "padded kernel": (
        lambda m, x: F.conv2d(x, F.pad(m.w, (1, 1, 1, 1))),
        *(IMAGE, (4, 8, 1, 1), CONV, ()),
    ),
    "repeat": (lambda m, x: F.linear(x, m.w.repeat(2, 1)), X, (6, 8), OUT_IN, (0,)),
    "tile": (lambda m, x: F.linear(x, torch.tile(m.w, (1, 2))), WIDE, (6, 8), OUT_IN, (1,)),
    "stacked by repeat": (
        lambda m, x: torch.bmm(x.expand(3, 5, 8), m.w.repeat(3, 1, 1)),
        *(X, (8, 6), OUT_IN[::-1], ()),
    ),
    "interleaved": (
        lambda m, x: F.linear(x, m.w.repeat_interleave(2, 1)),
        *(WIDE, (6, 8), OUT_IN, (1,)),
    ),
    "every other": (lambda m, x: F.linear(x, m.w[:, ::2]), X, (6, 16), OUT_IN, (1,)),
    "tril": (lambda m, x: F.linear(x, m.w.tril()), X, (8, 8), OUT_IN, ()),
    "triu": (lambda m, x: x @ m.w.triu(), X, (8, 8), OUT_IN[::-1], ()),
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("decomposed", [False, True])
def test_constant_transformations_keep_the_roles_of_the_use(name, decomposed):
    forward, x, shape, roles, reordered = PATHS[name]
    inputs = (torch.randn(x),)
    program = export_model(Net(forward, shape), inputs)
    program = program.run_decompositions() if decomposed else program
    site = fxs.find_weights(program)["w"]
    assert site.roles == roles
    assert {use.roles for use in site.uses} == {roles}
    if not decomposed:
        assert {use.reordered for use in site.uses} == {reordered}
    if name not in ("padded kernel", "pad", "tril", "triu"):  # what is zero anyway hides the rest
        Proof(program.module(), inputs).check(site)


@pytest.mark.parametrize("roles", [OUT_IN, OUT_IN[::-1]])
def test_blocks_hold_in_the_order_of_use_or_are_refused_by_name(roles):
    forward = PATHS["columns"][0] if roles == OUT_IN else PATHS["index_select"][0]
    x = (torch.randn(X),)
    for pattern in ("2:4", "block:4x4 50%", "block:1x4 50%"):
        with pytest.raises(MappingError, match=r"w: pattern .* not see in the order of storage"):
            fxs.prepare(Net(forward), fxs.WeightNormSparsifier(), x, pattern)
    for pattern in ("unstructured 50%", "rows 50%", "channels 50%", "block:4x1 50%"):
        fxs.prepare(Net(forward), fxs.WeightNormSparsifier(), x, pattern)
    # Rows in another order are still rows, of the same columns.
    fxs.prepare(Net(PATHS["rows"][0]), fxs.WeightNormSparsifier(), x, "2:4")


def test_an_index_that_depends_on_the_inputs_is_a_lookup():
    net = Net(lambda m, x: x + m.w[x.argmax(-1)])
    site = fxs.find_weights(net, (torch.randn(X),))["w"]
    assert (site.kind, site.roles) == ("lookup", ("row", "dim"))
    # So is a table that is looked up at constant places, and only added.
    net = Net(lambda m, x: x + m.w[m.p[:5]])
    site = fxs.find_weights(net, (torch.randn(X),))["w"]
    assert (site.kind, site.roles) == ("lookup", ("row", "dim"))


@pytest.mark.parametrize("name", ["columns", "rows", "flip", "roll", "gather", "pad"])
def test_calibration_pairs_columns_with_their_inputs_in_whatever_order(name):
    forward, x, shape, *_ = PATHS[name]
    net, plain = Net(forward, shape), Net(forward, shape)
    x = (torch.randn(x) * torch.arange(1, x[-1] + 1),)
    _, report = fxs.prune(net, fxs.WandaSparsifier(), [x], "unstructured:out 50%")
    assert list(report) == ["w"]
    # The oracle: the gradient by an element, which is as large as its input.
    norm = torch.zeros(shape)
    for row in x[0]:
        (gradient,) = torch.autograd.grad(plain(row[None]).sum(), plain.w)
        norm += gradient.square()
    score = plain.w.detach().abs() * norm.sqrt()
    kept = score.argsort(1).argsort(1) >= shape[1] // 2
    assert torch.equal(net.w != 0, kept)


@pytest.mark.parametrize("name", ["interleaved", "tile"])
def test_calibration_leaves_weights_alone_whose_columns_repeat(name):
    net, x = Net(PATHS[name][0], (6, 8)), torch.randn(WIDE)
    _, report = fxs.prune(net, fxs.WandaSparsifier(), [(x,)], "unstructured 50%")
    assert "repeated along its inputs" in report.dense["w"]


MORE = {
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=1), ("in", "out")),
    "tensordot by axes": (lambda m, x: torch.tensordot(m.w, x, ([1], [1])), ("out", "in")),
    "inner": (lambda m, x: torch.inner(x, m.w), ("out", "in")),
    "first of a chain": (lambda m, x: torch.linalg.multi_dot([m.w, x.t(), x]), ("out", "in")),
    "last of a chain": (lambda m, x: torch.linalg.multi_dot([x, x.t(), x, m.w]), ("in", "out")),
}


@pytest.mark.parametrize("name", MORE)
def test_further_products(name):
    forward, roles = MORE[name]
    net, x = Net(forward), torch.randn(X)
    assert fxs.find_weights(net, (x,))["w"].roles == roles
    before = net(x)
    with torch.no_grad():
        net.w.select(roles.index("out"), 2).zero_()
    changed = before != net(x)
    columns, rows = changed.any(0), changed.any(1)  # the oracle: one output changes
    assert [2] in (columns.nonzero().flatten().tolist(), rows.nonzero().flatten().tolist())


def test_a_sum_over_a_batch_of_products_reduces_the_batch():
    net = Net(lambda m, x: torch.addbmm(x[:, :6], x.expand(3, 5, 8), m.w), (3, 8, 6))
    site = fxs.find_weights(net, (torch.randn(X),))["w"]
    assert site.roles == ("in", "in", "out")


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_ensemble_under_vmap(decomposed):
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            members = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in "abc"]
            stacked, _ = stack_module_state(members)
            named = {
                name.replace(".", "_"): nn.Parameter(p.detach()) for name, p in stacked.items()
            }
            self.stacked, self.base = nn.ParameterDict(named), [members[0].to("meta")]

        def forward(self, x):
            stacked = {name.replace("_", "."): p for name, p in self.stacked.items()}
            return vmap(lambda p, x: functional_call(self.base[0], p, (x,)), (0, None))(stacked, x)

    program = export_model(Ensemble(), (torch.randn(5, 8),))
    program = program.run_decompositions() if decomposed else program
    weights = fxs.find_weights(program)
    expected = ("batch", "out", "in")
    assert {s.fqn: s.roles for s in weights.sites if len(s.shape) == 3} == {
        "stacked.0_weight": expected,
        "stacked.2_weight": expected,
    }
    assert all(use.slice is None for site in weights.sites for use in site.uses)


class LowRank(nn.Module):
    """A layer, and what is added to its weight: a product of two constants."""

    def __init__(self, transposed=False, alone=False):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Parameter(torch.randn(6, 8))
        self.up, self.down = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 8))
        self.transposed, self.alone = transposed, alone

    def forward(self, x):
        merged = self.up @ self.down if self.alone else torch.addmm(self.base, self.up, self.down)
        return x @ merged if self.transposed else F.linear(x, merged)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_factors_of_a_weight_have_the_roles_of_the_use(alone, transposed, decomposed):
    net, x = LowRank(transposed, alone), torch.randn(5, 6 if transposed else 8)
    program = export_model(net, (x,))
    program = program.run_decompositions() if decomposed else program
    weights = fxs.find_weights(program)
    roles = OUT_IN[::-1] if transposed else OUT_IN
    names = ("up", "down") if alone else ("base", "up", "down")
    assert {s.fqn: s.roles for s in weights.sites} == dict.fromkeys(names, roles)
    # The oracle: factors are layers, one after the other, with these roles.
    first, second = (net.up, net.down) if transposed else (net.down, net.up)
    with torch.no_grad():
        net.base.zero_()
        apart = x
        for factor in (first, second):
            apart = apart @ (factor if roles[0] == "in" else factor.t())
        assert torch.allclose(net(x), apart, atol=1e-4)


def test_factors_that_only_scale_or_shift_are_left_as_factors():
    net = LowRank(alone=True)
    net.forward = lambda x: x * (net.up @ net.down)[:5]
    weights = fxs.find_weights(net, (torch.randn(5, 8),))
    assert {site.kind for site in weights.sites} == {"matmul"}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    ("repeat", "apart"),
    [
        (lambda w: w.repeat_interleave(2, 1), True),  # a a b b
        (lambda w: w[:, :, None].expand(4, 8, 2).reshape(4, 16), True),
        (lambda w: w[:, None].expand(4, 2, 8).reshape(4, 16), False),  # a b a b
    ],
)
def test_what_is_repeated_element_by_element_has_other_neighbours(repeat, apart, decomposed):
    def forward(m, x):
        return F.linear(x, repeat(m.w))

    program = torch.export.export(Net(forward, (4, 8)), (torch.randn(3, 16),))
    (site,) = fxs.find_weights(program.run_decompositions() if decomposed else program).sites
    # The oracle: where the elements of one row come to lie.
    places = repeat(torch.arange(32.0).view(4, 8))[0].tolist()
    assert (places[:2] != [0.0, 1.0]) is apart
    assert (site.roles, site.uses[0].reordered) == (("out", "in"), (1,) if apart else ())
