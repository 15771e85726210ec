"""Parameters that enter subgraphs: modules and programs agree, and no reason is made up."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from fx_sparsity import find_weights
from fx_sparsity.graph import Reason


class Flex(nn.Module):
    """Attention whose scores are shifted by a table, and scaled by a parameter."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.table = nn.Parameter(torch.randn(16, 16))
        self.unread = nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, 2, 16).transpose(1, 2)

        def score(value, b, h, i, j):
            return value + self.table[i, j]

        mixed = flex_attention(q, q, q, score_mod=score)
        return self.o(mixed.transpose(1, 2).reshape(batch, tokens, 32))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x) @ self.matrix, (x,))


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.stack = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        return torch._higher_order_ops.map(lambda w, x: self.layer(x) @ w, self.stack, x)


CASES = {
    "flex": (Flex, (2, 16, 32), ["q.weight", "o.weight"]),
    "cond": (Conditional, (2, 8), ["a.weight", "b.weight", "matrix"]),
    "map": (Mapped, (2, 8), ["layer.weight", "stack"]),
}


@pytest.mark.parametrize("case", CASES)
def test_modules_and_programs_agree(case):
    make, shape, expected = CASES[case]
    model, x = make().eval().requires_grad_(False), (torch.randn(shape),)
    of_module = find_weights(model, x)
    of_program = find_weights(torch.export.export(model, x, strict=False))
    assert sorted(of_module) == sorted(expected)
    assert [(s.fqn, s.roles) for s in of_module.sites] == [
        (s.fqn, s.roles) for s in of_program.sites
    ]
    assert of_module.dense == of_program.dense


def test_what_a_subgraph_takes_in_another_way_is_left_open():
    model = Flex().eval().requires_grad_(False)
    found = {p.fqn: p for p in find_weights(model, (torch.randn(2, 16, 32),)).dense}
    assert found["table"].reason is Reason.OPERATOR
    assert found["table"].detail == "flex_attention"
    assert not found["table"].reason.explained
    assert found["unread"].reason is Reason.UNREACHABLE
