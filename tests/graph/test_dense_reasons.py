"""Tensors that act as weights but are no parameters, and reasons that settle a matter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fx_sparsity import find_weights
from fx_sparsity.graph import Reason

X = (torch.randn(2, 8),)


class Outside(nn.Module):
    """One layer that torch knows of, and others in plain containers."""

    def __init__(self, container):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.rest = container(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.rest.values() if isinstance(self.rest, dict) else self.rest:
            x = layer(x)
        return x


class Broken(Outside):
    """The same, where `torch.export` gives up."""

    def forward(self, x):
        x = x if x.sum().item() > -1e9 else -x
        return super().forward(x)


def keyed(layers):
    return dict(zip("abc", layers, strict=True))


@pytest.mark.parametrize("kind", [Outside, Broken])
@pytest.mark.parametrize(
    ("container", "names"), [(list, "012"), (tuple, "012"), (keyed, "abc"), (lambda x: [[*x]], "")]
)
def test_layers_in_plain_containers_are_listed(kind, container, names):
    if not names:
        container, names = list, "012"
        model = kind(list)
        model.rest = {"inner": model.rest}
        model.forward = lambda x: nn.Sequential(model.first, *model.rest["inner"])(x)
        path = "rest.inner"
    else:
        model, path = kind(container), "rest"
    weights = find_weights(model, X)
    assert list(weights) == ["first.weight"]
    assert [p.fqn for p in weights.dense] == [f"{path}.{name}.weight" for name in names]
    assert {p.text for p in weights.dense} == {"no parameter: a constant or an attribute: linear"}
    assert "nothing of two or more" not in str(weights)
    assert all(p.reason.explained for p in weights.dense)


def test_layers_in_plain_containers_are_listed_without_inputs():
    weights = find_weights(Outside(list))
    assert list(weights) == ["first.weight"]
    assert [p.fqn for p in weights.dense] == [f"rest.{i}.weight" for i in range(3)]


class Held(nn.Module):
    """Matrices held in every other way; and tables that only shift, scale, mask or are looked up."""

    def __init__(self):
        super().__init__()
        self.plain, self.unused = torch.randn(8, 8), torch.randn(8, 8)
        self.by_name = {
            "a": nn.Parameter(torch.randn(8, 8)),
            "b": (nn.Parameter(torch.ones(9, 8)),),
        }
        self.register_buffer("kept", torch.randn(8, 8))
        self.register_buffer("passing", torch.randn(8, 8), persistent=False)
        self.register_buffer("position", torch.randn(2, 8))
        self.register_buffer("window", torch.randn(16, 8))
        self.register_buffer("frequencies", torch.randn(1, 8, 1))
        self.register_buffer("order", torch.arange(8)[None].repeat(2, 1))
        self.scale = torch.randn(2, 8)

    def forward(self, x):
        x = x @ self.plain @ self.by_name["a"] @ self.kept @ self.passing
        x = x @ torch.tensor([[1.0] * 8] * 8)
        rows = x.argmax(-1)
        x = x + self.by_name["b"][0][rows] + self.window[rows]
        turned = (self.frequencies @ x.unsqueeze(1)).sum(1)
        return (x + self.position + turned) * self.scale.gather(1, self.order)


def test_what_acts_as_a_matrix_is_listed_however_it_is_held():
    weights = find_weights(Held(), X)
    assert not weights
    found = {p.fqn: p.text for p in weights.dense}
    constant = next(name for name in found if name.startswith("lifted"))
    attribute, buffer = "no parameter: a constant or an attribute", "no parameter: a buffer"
    assert found == {
        "plain": f"{attribute}: matmul",
        "by_name.a": f"{attribute}: matmul",
        "by_name.b.0": f"{attribute}: lookup",
        "kept": f"{buffer}: matmul",
        "passing": f"{buffer}: matmul",
        constant: f"{attribute}: matmul",
    }


def test_a_mask_that_is_a_plain_attribute_hides_no_weight():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.mask = nn.Parameter(torch.randn(8, 8)), torch.ones(8, 8)

        def forward(self, x):
            return F.linear(x, self.weight * self.mask)

    weights = find_weights(Masked(), X)
    assert weights["weight"].roles == ("out", "in")
    assert not weights.dense
    assert Reason.BUFFER.explained


class One(nn.Module):
    def __init__(self, forward, **shapes):
        super().__init__()
        torch.manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (x[:, None] * m.v).sum(-1),
        lambda m, x: (m.v * x.unsqueeze(1) * 2 * x[:, None].abs()).sum(2),
        lambda m, x: (x[:, :, None] * m.v.t()).float().mean(1),
        lambda m, x: (x[:, None] - m.v).pow(2).sum(-1),
        lambda m, x: (m.v - x[:, None]).abs().sum(-1),
        lambda m, x: torch.cdist(x, m.v),
    ],
)
def test_a_product_or_a_difference_that_is_summed_is_no_mere_scale(forward):
    model = One(forward, v=(5, 8))
    # The oracle: one element of the result depends on a whole row of the parameter.
    (gradient,) = torch.autograd.grad(model(*X)[0, 2], model.v)
    assert (gradient[2] != 0).all()
    weights = find_weights(model, X)
    assert "v" in weights or not weights.dense[0].reason.explained


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: (x * m.v).pow(2).mean(-1), Reason.SCALE),
        (lambda m, x: (x * m.v.mean(1, keepdim=True)).sum(1), Reason.SCALE),
        (lambda m, x: (x + m.v).mean(0), Reason.ADDED),
        (lambda m, x: (x * m.v).relu(), Reason.SCALE),
        (lambda m, x: torch.addmm(m.v, x, x.new_ones(8, 8)), Reason.ADDED),
        (lambda m, x: torch.baddbmm(m.v, x[None], x.new_ones(1, 8, 8)), Reason.ADDED),
    ],
)
def test_scales_and_shifts_are_explained(forward, reason):
    (parameter,) = find_weights(One(forward, v=(2, 8)), X).dense
    assert parameter.reason is reason


def test_a_kernel_that_is_folded_into_another_is_a_weight():
    def forward(m, x):
        return F.conv2d(x, m.k3 + F.pad(m.k1, (1, 1, 1, 1)), padding=1)

    model, x = One(forward, k3=(6, 4, 3, 3), k1=(6, 4, 1, 1)), torch.randn(2, 4, 5, 5)
    weights = find_weights(model, (x,))
    assert {s.fqn: s.roles for s in weights.sites} == dict.fromkeys(
        ("k3", "k1"), ("out", "in", "kernel", "kernel")
    )
    # The oracle: they are two convolutions, side by side; zeros of one are filled by the other.
    apart = F.conv2d(x, model.k3, padding=1) + F.conv2d(x, model.k1)
    assert torch.allclose(model(x), apart, atol=1e-4)
    assert all(site.lost_zeros for site in weights.sites)


class Experts(nn.Module):
    """Picks one of some experts for each token."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4))
        self.table = nn.Parameter(torch.randn(3, 4))
        self.linear = nn.Linear(8, 4)

    def forward(self, x, which):
        picked = torch.bmm(x.unsqueeze(1), self.weight[which]).squeeze(1) + self.bias[which]
        return picked + (self.linear(x) + self.table[which])


def test_the_biases_of_experts_are_biases_and_tables_are_tables():
    weights = find_weights(Experts(), (torch.randn(5, 8), torch.tensor([0, 2, 1, 1, 0])))
    assert {fqn: site.kind for fqn, site in weights.items()} == {
        "weight": "matmul",
        "table": "lookup",
        "linear.weight": "linear",
    }
    assert [(other.fqn, other.reason) for other in weights.dense] == [("bias", Reason.ADDED)]
