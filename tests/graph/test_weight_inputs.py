"""The inputs of a weight, of every operator, against the derivative of the operator itself.

A product is linear in its weight: of a result y that multiplies input x with weight element (o, i), the
derivative dy/dW[o, i] is x[i]. The sum of its square over all results is what `squares` says of that
element, and so on, whatever the storage. Derivatives are taken in float64.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fx_sparsity import prune
from fx_sparsity.graph.operators import OPERATORS
from tests.coverage.test_operators import RECURRENT, ROWS, Function, cases
from tests.pruning.tiny_methods import Everything

UNSEEN = {*("tensordot", "linalg_multi_dot"), *RECURRENT, "_native_multi_head_attention"}
UNSEEN |= {"_transformer_encoder_layer_fwd", "multi_head_attention_forward"}
UNSEEN |= {"getitem"}  # which exported graphs do not have
UNSEEN |= {name for name in OPERATORS if name.endswith("_cell")}
SEEN = {name: found for name, found in ROWS.items() if name not in UNSEEN}


def table(mode, **options):
    offsets = torch.tensor([0, 3, 3])
    indices = torch.tensor([1, 2, 1, 6, 0])
    return lambda x, w: F.embedding_bag(indices, w, offsets, mode=mode, **options) + x.sum()


def weighted(x, w):
    coefficients = torch.tensor([0.5, -1.0, 2.0, 1.0, 0.0]).type_as(w)
    return table("sum", per_sample_weights=coefficients)(x, w)


MORE = {
    "conv1d": [
        (lambda x, w: F.conv1d(x, w, stride=2, padding=2, dilation=2), (2, 8, 9), (5, 8, 3)),
        (lambda x, w: F.conv1d(x, w, padding="same"), (2, 8, 9), (5, 8, 4)),
        (lambda x, w: F.conv1d(x, w, groups=8), (2, 8, 9), (8, 1, 3)),
        (F.conv1d, (8, 9), (5, 8, 3)),
    ],
    "conv2d": [
        (
            lambda x, w: F.conv2d(x, w, stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=2),
            (2, 8, 7, 6),
            (6, 4, 3, 2),
        ),
        (lambda x, w: F.conv2d(x, w.permute(1, 0, 2, 3)), (2, 8, 5, 5), (8, 3, 2, 2)),
    ],
    "conv_transpose2d": [
        (
            lambda x, w: F.conv_transpose2d(
                x, w, stride=(3, 2), padding=(1, 2), output_padding=1, groups=2, dilation=(1, 2)
            ),
            (2, 8, 4, 5),
            (8, 3, 3, 2),
        )
    ],
    "linear": [
        (lambda x, w: F.linear(x, w.t()), (3, 4, 8), (8, 5)),
        (lambda x, w: sum(F.linear(x, part) for part in w.chunk(3)), (3, 8), (15, 8)),
        (lambda x, w: F.linear(x, w.view(10, 8)), (3, 8), (5, 2, 8)),
        (lambda x, w: F.linear(x, torch.cat([torch.ones(2, 8).type_as(w), w])), (3, 8), (5, 8)),
    ],
    "bmm": [
        (
            lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2, 1])], x.unsqueeze(-1)),
            (4, 8),
            (3, 5, 8),
        ),
        (lambda x, w: torch.bmm(x, w.expand(3, 8, 5)), (3, 4, 8), (1, 8, 5)),
    ],
    "matmul": [
        (lambda x, w: x @ w, (2, 3, 4, 8), (3, 8, 5)),
        (lambda x, w: w @ x, (8,), (5, 8)),
        (lambda x, w: x @ w, (8,), (3, 8, 5)),
    ],
    "einsum": [
        (lambda x, w: torch.einsum("bsd,dhk->bhsk", x, w), (2, 3, 8), (8, 2, 4)),
        (lambda x, w: torch.einsum("bshk,hkd->bsd", x, w), (2, 3, 2, 4), (2, 4, 5)),
        (lambda x, w: torch.einsum("bi,oi", x, w), (3, 8), (5, 8)),
        (lambda x, w: torch.einsum("b...i,b...j,oij->b...o", x, x + 1, w), (2, 3, 4), (5, 4, 4)),
    ],
    "embedding_bag": [
        (table("sum"), (3, 2), (7, 8)),
        (table("mean"), (3, 2), (7, 8)),
        (table("mean", padding_idx=1), (3, 2), (7, 8)),
        (table("sum", include_last_offset=True), (3, 2), (7, 8)),
        (weighted, (3, 2), (7, 8)),
    ],
    "index": [
        (lambda x, w: w[x[:, 0] > 0], (7, 8), (7, 8)),
        (lambda x, w: w[torch.tensor([-1, 0, -1])], (7, 8), (7, 8)),
    ],
}


def derivatives(function, x, weight):
    """dy/dW in float64, [results, elements of the weight]."""
    weight = weight.detach().double()
    double = lambda w: function(x.double(), w).flatten()  # noqa: E731
    return torch.autograd.functional.jacobian(double, weight).flatten(1)


def check(function, activation, weight):
    torch.manual_seed(0)
    batches = [(torch.randn(activation),) for _ in range(2)]
    model = Function(function, weight)
    dense = model.weight.detach().clone()
    method = Everything()
    _, report = prune(model, method, batches)
    ((matrix, stats, _),) = method.shown
    expected = torch.zeros(3, dense.numel(), dtype=torch.float64)
    gram = torch.zeros(dense.numel(), dense.numel(), dtype=torch.float64)
    for (x,) in batches:
        found = derivatives(function, x, dense)
        gram += found.T @ found
        expected[0] += found.sum(0)
        expected[1] += found.square().sum(0)
        expected[2] += (found != 0).sum(0)
    (groups, out, size) = matrix.shape
    places = place_in(dense, matrix)
    for o in range(out):
        at = places[:, o]
        close(stats.squares, expected[1][at])
        close(stats.sums, expected[0][at])
        for g in range(groups if stats.gram is not None else 0):
            close(stats.gram[g], gram[at[g]][:, at[g]])
    return stats, report


def close(found, expected):
    assert torch.allclose(found.double(), expected, rtol=2e-5, atol=2e-5)


def place_in(dense, matrix):
    """Where each element of the matrix form lies in storage, by its value."""
    order = dense.flatten().argsort()
    places = order[torch.searchsorted(dense.flatten()[order], matrix)]
    assert len(places.unique()) == dense.numel()
    return places


@pytest.mark.parametrize(("name", "function", "activation", "weight", "roles"), cases(SEEN))
def test_inputs_are_those_of_the_operator(name, function, activation, weight, roles):
    if name in SAME:
        check_same(function, ROWS[SAME[name]][0][0], activation, weight)
        return
    stats, _ = check(function, activation, weight)
    assert (stats.tokens > 0).all()


@pytest.mark.parametrize(
    ("function", "activation", "weight"),
    [
        pytest.param(*case, id=f"{name}-{i}")
        for name, found in MORE.items()
        for i, case in enumerate(found)
    ],
)
def test_inputs_of_other_layouts(function, activation, weight):
    check(function, activation, weight)


SAME = {"_grouped_mm": "grouped_mm_fallback", "_embedding_bag_forward_only": "_embedding_bag"}
"""Operators in half precision alone, or without a derivative -> others that do the same."""


def check_same(function, same, activation, weight):
    torch.manual_seed(0)
    x = torch.randn(activation).bfloat16().float()
    shown = []
    for chosen in (function, same):
        method = Everything()
        prune(Function(chosen, weight), method, [(x,)])
        shown.append(method.shown[0][1])
    for name in ("tokens", "squares", "sums", "gram"):
        found, expected = (getattr(stats, name) for stats in shown)
        assert expected is None if found is None else torch.equal(found, expected)


def test_operators_without_inputs_are_few_and_named():
    assert {name for name, row in OPERATORS.items() if row.inputs is None} == UNSEEN


@pytest.mark.parametrize("name", ["lstm", "gru_cell", "_native_multi_head_attention"])
def test_weights_whose_inputs_are_not_seen_are_left_alone(name):
    if name in RECURRENT:
        model, x = RECURRENT[name], torch.randn(3, 2, 8)
    else:
        function, activation, shape, _ = ROWS[name][0]
        model, x = Function(function, shape), torch.randn(activation)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, report = prune(model, Everything(level=0.5), [(x,)])
    assert not report.rows
    assert set(report.dense.values()) == {f"the inputs of its uses in {name} are not seen"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tokens_are_counted_by_group():
    model = Function(ROWS["grouped_mm_fallback"][0][0], (3, 16, 8))
    method = Everything()
    _, report = prune(model, method, [(torch.randn(6, 16),)])
    (_, stats, _) = method.shown[0]
    assert int(stats.tokens.sum()) == 6
    assert report["weight"].tokens == 6


def test_an_expert_without_inputs_is_counted():
    def picked(x, w):
        return torch.bmm(w[torch.tensor([2, 0])], x.unsqueeze(-1))

    method = Everything()
    _, report = prune(Function(picked, (3, 5, 8)), method, [(torch.randn(2, 8),)])
    assert method.shown[0][1].tokens.tolist() == [1, 0, 1]
    row = report["weight"]
    assert (row.groups, row.fewest, row.few) == (3, 0, 3)
    assert report.few_tokens.startswith("3 of 3 experts in 1 weights met fewer tokens")


def test_a_bag_of_maxima_counts_its_lookups():
    method = Everything()
    prune(Function(table("max"), (7, 8)), method, [(torch.randn(3, 2),)])
    assert method.shown[0][1].squares.tolist() == [[1, 1, 1, 0, 0, 0, 1]]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_a_tied_weight_sums_over_its_uses():
    model, x, method = Tied(), torch.randn(5, 4), Everything()
    middle = model.a(x).relu()
    prune(model, method, [(x,)])
    ((_, stats, _),) = method.shown
    inputs = torch.cat([x, middle]).double()
    close(stats.gram[0], inputs.T @ inputs)
    assert stats.tokens.tolist() == [10]


def test_a_table_that_is_a_head_too_is_a_matrix():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens).tanh())

    model, method, tokens = Language(), Everything(), torch.randint(9, (2, 5))
    x = model.embed(tokens).tanh().flatten(0, 1).double()
    _, report = prune(model, method, [(tokens,)])
    close(method.shown[0][1].gram[0], x.T @ x)
    assert "its lookups are not counted, only its products" in report["embed.weight"].notes


def test_slices_that_meet_different_inputs_are_averaged_over_outputs():
    def sliced(x, w):
        return F.linear(x, w[:2]) + F.linear(x * 2, w[2:])

    x, method = torch.randn(3, 8), Everything()
    prune(Function(sliced, (4, 8)), method, [(x,)])
    (_, stats, _) = method.shown[0]
    close(stats.gram[0], (1 + 4) / 2 * (x.double().T @ x.double()))
    assert stats.tokens.tolist() == [3]


def test_parts_along_the_inputs_lack_the_products_between_them():
    def parted(x, w):
        return F.linear(x[:, :3], w[:, :3]) + F.linear(x[:, 3:], w[:, 3:])

    x, method = torch.randn(3, 8), Everything()
    _, report = prune(Function(parted, (4, 8)), method, [(x,)])
    (_, stats, _) = method.shown[0]
    gram = x.double().T @ x.double()
    gram[:3, 3:], gram[3:, :3] = 0, 0
    close(stats.gram[0], gram)
    assert stats.tokens.tolist() == [3]
    assert "products with one another are not seen" in report["weight"].notes[0]


def test_a_call_whose_inputs_are_not_known_leaves_its_weight_dense():
    def looked_up(x, w):
        return w[torch.tensor([0, 1]), torch.tensor([2, 3])] + x.sum()

    model = Function(looked_up, (5, 8))
    before = model.weight.clone()
    _, report = prune(model, Everything(level=0.5), [(torch.randn(3),)])
    assert report.dense == {"weight": "a lookup by several indices"}
    assert torch.equal(model.weight, before)
