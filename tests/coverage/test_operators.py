"""Every row of the operator table, proved by execution: one small function a row."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from transformers.integrations import moe  # noqa: F401, registers grouped_mm_fallback

from fx_sparsity import find_weights
from fx_sparsity.graph.operators import MODULES, OPERATORS
from tests.coverage.proof import ATTENTION, Proof, Wrong

aten = torch.ops.aten
X, STACK = (6, 8), (3, 6, 8)
INDEX = torch.tensor([0, 4, 2, 4])
OFFSETS = torch.tensor([2, 3, 6], dtype=torch.int32)


def conv(dims, transposed=False, groups=2):
    zeros, ones = [0] * dims, [1] * dims
    return lambda x, w: aten.convolution.default(
        x, w, None, ones, zeros, ones, transposed, zeros, groups
    )


def bags(operator, *options):
    return lambda x, w: operator(w, INDEX, torch.tensor([0, 3]), *options)[0] + x.sum()


def cell(operator, states, recurrent):
    """A cell whose weight is the one over the state, or the one over the input."""

    def step(x, w):
        other = torch.ones(w.shape[0], 4 if not recurrent else 8)
        h = x[:, :4] * 2 + 1
        weights = (other, w) if recurrent else (w, other)
        result = operator(x, [h, h] if states == 2 else h, *weights)
        return result[0] if states == 2 else result

    gates = {aten.lstm_cell.default: 4, aten.gru_cell.default: 3}.get(operator, 1)
    return step, X, (4 * gates, 4 if recurrent else 8), ("out", "in")


def trilinear(x, w):
    return aten._trilinear.default(x, w, x + 1, [1, 3], [0], [1, 2], [2, 3])


def attention_forward(place):
    """A function of the packed, a separate or the output projection: the last three by name."""

    def forward(x, w):
        weights = {
            "in_proj_weight": None if place.startswith(("q", "k", "v")) else torch.ones(24, 8),
            **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), torch.ones(8, 8)),
            "out_proj_weight": torch.ones(8, 8),
            place: w,
        }
        # Values that are no constants, so that each has a node of its own.
        biases = {"in_proj_bias": torch.zeros(24), "out_proj_bias": torch.zeros(8)}
        separate = weights["in_proj_weight"] is None
        if not separate:
            weights = {n: v for n, v in weights.items() if not n.startswith(("q", "k", "v"))}
        return F.multi_head_attention_forward(
            *(x, x + 1, x * 2, 8, 2),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            training=False,
            need_weights=False,
            use_separate_proj_weight=separate,
            **weights,
            **biases,
        )[0]

    return forward


def native_attention(place):
    def forward(x, w):
        weights = [torch.ones(24, 8), torch.zeros(24), torch.ones(8, 8), torch.zeros(8)]
        weights[place] = w
        return torch._native_multi_head_attention(
            x, x + 1, x * 2, 8, 2, *weights, need_weights=False
        )[0]

    return forward


def encoder_layer(place):
    """A layer that normalises first, of 8 channels and 12 hidden units."""

    def forward(x, w):
        shapes = [(24, 8), (24,), (8, 8), (8,)]
        feed_forward = [(12, 8), (12,), (8, 12), (8,)]
        weights = [torch.ones(shape) for shape in [*shapes, *[(8,)] * 4, *feed_forward]]
        weights[place] = w
        return torch._transformer_encoder_layer_fwd(
            x, 8, 2, *weights[:4], False, True, 1e-5, *weights[4:]
        )

    return forward


SEQUENCE, SQUARE, PACKED = (3, 5, 8), (8, 8), (24, 8)
TABLE = (X, (7, 8), ("row", "dim"))
# row -> [(function of an activation and a weight, activation's shape, weight's shape, roles)]
ROWS = {
    "linear": [
        (F.linear, X, (5, 8), ("out", "in")),
        (lambda x, w: F.linear(w, x), X, (5, 8), ("out", "in")),
    ],
    "addmm": [
        (lambda x, w: torch.addmm(x.new_zeros(5), x, w), X, (8, 5), ("in", "out")),
        (lambda x, w: torch.addmm(x.new_zeros(8), w, x), X, (5, 6), ("out", "in")),
    ],
    "mm": [
        (torch.mm, X, (8, 5), ("in", "out")),
        (lambda x, w: torch.mm(w, x), X, (5, 6), ("out", "in")),
        (lambda x, w: torch.mm(x, w.t()), X, (5, 8), ("out", "in")),
    ],
    "matmul": [
        (torch.matmul, X, (8, 5), ("in", "out")),
        (lambda x, w: w @ x, X, (5, 6), ("out", "in")),
        (torch.matmul, STACK, (3, 8, 5), ("batch", "in", "out")),
    ],
    "addbmm": [
        (lambda x, w: torch.addbmm(x.new_zeros(1), x, w), STACK, (3, 8, 5), ("in", "in", "out")),
        (lambda x, w: torch.addbmm(x.new_zeros(1), w, x), STACK, (3, 5, 6), ("in", "out", "in")),
    ],
    "inner": [
        (torch.inner, X, (5, 8), ("out", "in")),
        (lambda x, w: torch.inner(w, x), X, (5, 8), ("out", "in")),
    ],
    "tensordot": [
        (lambda x, w: torch.tensordot(x, w, 1), X, (8, 5), ("in", "out")),
        (lambda x, w: torch.tensordot(x, w, ([1], [0])), X, (8, 5), ("in", "out")),
    ],
    "linalg_multi_dot": [
        (lambda x, w: torch.linalg.multi_dot([x, w]), X, (8, 5), ("in", "out")),
    ],
    "mv": [(lambda x, w: torch.mv(w, x), (8,), (5, 8), ("out", "in"))],
    "bmm": [
        (torch.bmm, STACK, (3, 8, 5), ("batch", "in", "out")),
        (lambda x, w: torch.bmm(w, x), STACK, (3, 5, 6), ("batch", "out", "in")),
    ],
    "baddbmm": [
        (
            lambda x, w: torch.baddbmm(x.new_zeros(1), x, w),
            STACK,
            (3, 8, 5),
            ("batch", "in", "out"),
        ),
        (
            lambda x, w: torch.baddbmm(x.new_zeros(1), w, x),
            STACK,
            (3, 5, 6),
            ("batch", "out", "in"),
        ),
    ],
    "bilinear": [(lambda x, w: F.bilinear(x, x + 1, w), X, (5, 8, 8), ("out", "in", "in"))],
    "_trilinear": [(trilinear, X, (5, 8, 8), ("out", "in", "in"))],
    "lstm_cell": [cell(aten.lstm_cell.default, 2, r) for r in (False, True)],
    "gru_cell": [cell(aten.gru_cell.default, 1, r) for r in (False, True)],
    "rnn_tanh_cell": [cell(aten.rnn_tanh_cell.default, 1, r) for r in (False, True)],
    "rnn_relu_cell": [cell(aten.rnn_relu_cell.default, 1, r) for r in (False, True)],
    "einsum": [
        (lambda x, w: torch.einsum("bi,io->bo", x, w), X, (8, 5), ("in", "out")),
        (lambda x, w: torch.einsum("...i,oi->...o", x, w), STACK, (5, 8), ("out", "in")),
        (lambda x, w: torch.einsum("ebi,eio->ebo", x, w), STACK, (3, 8, 5), ("batch", "in", "out")),
    ],
    "embedding": [(lambda x, w: F.embedding(INDEX, w) + x.sum(), X, (7, 8), ("row", "dim"))],
    "embedding_bag": [
        (bags(aten.embedding_bag.padding_idx, False, 0, False, None, False, None), *TABLE)
    ],
    "_embedding_bag": [(bags(aten._embedding_bag.default), *TABLE)],
    "_embedding_bag_forward_only": [(bags(aten._embedding_bag_forward_only.default), *TABLE)],
    "index": [
        (lambda x, w: w[INDEX] + x.sum(), X, (7, 8), ("row", "dim")),
        (lambda x, w: w[:, INDEX] + x.sum(), X, (7, 8), ("dim", "row")),
    ],
    "index_select": [(lambda x, w: w.index_select(1, INDEX) + x.sum(), X, (7, 8), ("dim", "row"))],
    "gather": [
        (
            lambda x, w: w.gather(0, INDEX.view(-1, 1).expand(4, 8)) + x.sum(),
            X,
            (7, 8),
            ("row", "dim"),
        )
    ],
    "conv1d": [(F.conv1d, (2, 8, 6), (5, 8, 3), ("out", "in", "kernel"))],
    "conv2d": [
        (F.conv2d, (2, 8, 6, 6), (5, 8, 3, 3), ("out", "in", "kernel", "kernel")),
        (
            lambda x, w: F.conv2d(x, w, groups=2, padding="same"),
            (2, 8, 6, 6),
            (6, 4, 3, 3),
            ("out", "in", "kernel", "kernel"),
        ),
    ],
    "conv3d": [(F.conv3d, (2, 8, 4, 4, 4), (5, 8, 3, 3, 3), ("out", "in", *["kernel"] * 3))],
    "conv_transpose1d": [(F.conv_transpose1d, (2, 8, 6), (8, 5, 3), ("in", "out", "kernel"))],
    "conv_transpose2d": [
        (
            lambda x, w: F.conv_transpose2d(x, w, groups=2),
            (2, 8, 6, 6),
            (8, 5, 3, 3),
            ("in", "out", "kernel", "kernel"),
        )
    ],
    "conv_transpose3d": [
        (F.conv_transpose3d, (2, 8, 4, 4, 4), (8, 5, 3, 3, 3), ("in", "out", *["kernel"] * 3))
    ],
    "convolution": [
        (conv(2), (2, 8, 6, 6), (6, 4, 3, 3), ("out", "in", "kernel", "kernel")),
        (conv(1, transposed=True), (2, 8, 6), (8, 5, 3), ("in", "out", "kernel")),
    ],
    "_native_multi_head_attention": [
        (native_attention(0), SEQUENCE, PACKED, ("out", "in")),
        (native_attention(2), SEQUENCE, SQUARE, ("out", "in")),
    ],
    "_transformer_encoder_layer_fwd": [
        (encoder_layer(0), SEQUENCE, PACKED, ("out", "in")),
        (encoder_layer(2), SEQUENCE, SQUARE, ("out", "in")),
        (encoder_layer(8), SEQUENCE, (12, 8), ("out", "in")),
        (encoder_layer(10), SEQUENCE, (8, 12), ("out", "in")),
    ],
    "_grouped_mm": [
        (
            lambda x, w: torch._grouped_mm(x.bfloat16(), w.bfloat16(), offs=OFFSETS),
            (6, 16),
            (3, 16, 8),
            ("batch", "in", "out"),
        )
    ],
    "grouped_mm_fallback": [
        (
            lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w, OFFSETS),
            (6, 16),
            (3, 16, 8),
            ("batch", "in", "out"),
        )
    ],
}
TRACED = {
    "getitem": [(lambda x, w: w[INDEX] + x.sum(), *TABLE)],
    "multi_head_attention_forward": [
        (attention_forward(place), SEQUENCE, PACKED if place[0] == "i" else SQUARE, ("out", "in"))
        for place in (
            *("in_proj_weight", "out_proj_weight"),
            *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
        )
    ],
}
"""Rows that only symbolic traces and Dynamo graphs show."""
SAME_AS = {"grouped_mm": "_grouped_mm"}
"""Functions in Python that stay whole in Dynamo graphs only -> the operator that they call."""
RECURRENT = {
    "lstm": nn.LSTM(8, 4, bidirectional=True),
    "gru": nn.GRU(8, 4),
    "rnn_tanh": nn.RNN(8, 4),
    "rnn_relu": nn.RNN(8, 4, nonlinearity="relu"),
}
"""Rows proved on whole modules."""


class Function(nn.Module):
    """One operator over one weight."""

    def __init__(self, function, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def cases(rows):
    return [
        pytest.param(name, *case, id=f"{name}-{i}")
        for name, found in rows.items()
        for i, case in enumerate(found)
    ]


def test_every_row_is_proved():
    assert set(OPERATORS) == {*ROWS, *TRACED, *SAME_AS, *RECURRENT}


def prove(graph, name, args, roles):
    gm = graph if isinstance(graph, fx.GraphModule) else graph.module()
    (site,) = find_weights(graph).sites
    assert [use.op for use in site.uses] == [name]
    assert site.roles == roles
    Proof(gm, args).check(site)


@pytest.mark.parametrize(("name", "function", "activation", "weight", "roles"), cases(ROWS))
def test_a_row_does_what_it_says(name, function, activation, weight, roles):
    torch.manual_seed(0)
    args = (torch.randn(activation),)
    program = torch.export.export(Function(function, weight), args, strict=False)
    prove(program, name, args, roles)


@pytest.mark.parametrize(("name", "function", "activation", "weight", "roles"), cases(TRACED))
def test_a_row_of_traced_graphs_does_what_it_says(name, function, activation, weight, roles):
    torch.manual_seed(0)
    gm = fx.symbolic_trace(Function(function, weight))
    prove(gm, name, (torch.randn(activation),), roles)


ATTENTION_ROWS = {name: {**ROWS, **TRACED}[name] for name in ATTENTION}


@pytest.mark.parametrize(
    ("name", "function", "activation", "weight", "roles"), cases(ATTENTION_ROWS)
)
def test_the_proof_of_a_fused_attention_refutes_wrong_roles(
    name, function, activation, weight, roles
):
    torch.manual_seed(0)
    module, args = Function(function, weight), (torch.randn(activation),)
    graph = fx.symbolic_trace(module) if name in TRACED else torch.export.export(module, args)
    gm = graph if name in TRACED else graph.module()
    (site,) = find_weights(graph).sites
    for wrong in (("in", "out"), ("in", "in"), ("out", "out")):
        uses = tuple(replace(use, roles=wrong) for use in site.uses)
        with pytest.raises(Wrong, match="weight dim . as"):
            Proof(gm, args).check(replace(site, uses=uses))


def test_a_function_has_the_roles_of_the_operator_that_it_calls():
    x, w = torch.randn(6, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    assert torch.equal(F.grouped_mm(x, w, offs=OFFSETS), torch._grouped_mm(x, w, offs=OFFSETS))
    assert list(inspect.signature(F.grouped_mm).parameters)[:2] == ["mat_a", "mat_b"]
    found = {
        name: [axes for _, _, axes in OPERATORS[name].find({"mat_b": w, "mat2": w})]
        for name in ("grouped_mm", *SAME_AS.values())
    }
    assert found["grouped_mm"] == found["_grouped_mm"]


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_rows_do_what_they_say(name):
    args = (torch.randn(3, 2, 8),)
    program = torch.export.export(RECURRENT[name], args, strict=False)
    weights = find_weights(program)
    assert {site.roles for site in weights.sites} == {("out", "in")}
    assert {use.op for site in weights.sites for use in site.uses} == {name}
    proof = Proof(program.module(), args)
    for site in weights.sites:
        proof.check(site)


def test_modules_have_the_roles_of_their_operators():
    """Called as a whole or opened up by export: the same weights, the same roles."""
    made = [
        (nn.Linear(8, 4), torch.randn(2, 8)),
        (nn.Embedding(9, 4), INDEX),
        (nn.EmbeddingBag(9, 4), INDEX.view(2, 2)),
        (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 6, 6)),
        (nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 6, 6)),
        (nn.LSTM(8, 4, proj_size=2), torch.randn(3, 2, 8)),
        (nn.GRUCell(8, 4), torch.randn(2, 8)),
    ]
    for module, x in made:
        model = nn.Sequential(module)
        called = find_weights(fx.symbolic_trace(model))
        opened = find_weights(torch.export.export(model, (x,), strict=False))
        assert {s.fqn: s.roles for s in called.sites} == {s.fqn: s.roles for s in opened.sites}
        assert any(isinstance(module, base) for base in MODULES)
