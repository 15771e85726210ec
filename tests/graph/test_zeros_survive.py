"""Whether zeros of a weight are zeros where it is used; proved on the model's own operators."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import fx_sparsity as fxs
from fx_sparsity.graph import MappingError, Reason
from fx_sparsity.graph.frontends import export_model
from fx_sparsity.sparsifier import MaskError, SparsityRecord


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weight in every call."""

    def forward(self, x):
        w = self.weight
        w = w - w.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias)


class Net(nn.Module):
    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.c = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.register_buffer("mask", torch.rand(8, 8) > 0.3)
        self.change = change

    def seen(self):
        return self.change(self.w, self)

    def forward(self, x):
        return F.linear(x, self.seen())


def soft_threshold(w, net):
    return w - w.clamp(-0.1, 0.1)


def straight_through(w, net):
    return w + (torch.round(w * 4) / 4 - w).detach()


def written(w, net):
    seen = torch.zeros(8, 16)
    seen[:, :8] += w
    return seen[:, :8]


SURVIVE = {
    "scaled": lambda w, net: w * 0.3 / w.std(),
    "normalized": lambda w, net: F.normalize(w, dim=1),
    "masked": lambda w, net: w * net.mask,
    "selected": lambda w, net: torch.where(net.mask, w, 0.5),
    "cast": lambda w, net: w.half().float(),
    "quantized": lambda w, net: torch.fake_quantize_per_tensor_affine(w, 0.1, 3, -128, 127),
    "straight through": straight_through,
    "soft": soft_threshold,
    "there and back": lambda w, net: (w.exp() - 1) * 2,
    "tanh": lambda w, net: w.tanh().abs().relu(),
    "signed root": lambda w, net: w.sign() * w.abs().sqrt(),
    "written": written,
    "moved": lambda w, net: w.t().flip(0),
    "doubled": lambda w, net: w + w,
}
MOVED = {
    "centred": (lambda w, net: w - w.mean(), "sub"),
    "standardized": (lambda w, net: (w - w.mean(1, True)) / (w.std(1, keepdim=True)), "sub"),
    "exp": (lambda w, net: w.exp(), "exp"),
    "sigmoid": (lambda w, net: 2 * w.sigmoid(), "sigmoid"),
    "cos": (lambda w, net: w.cos(), "cos"),
    "shifted": (lambda w, net: w + 0.1, "add"),
    "another": (lambda w, net: net.c.detach() * 0.5 + w, "add"),
    "symmetric": (lambda w, net: (w + w.t()) / 2, "add"),
    "factor": (lambda w, net: w @ net.c.detach(), "matmul"),
    "softmax": (lambda w, net: w.softmax(-1), "softmax"),
    "layer norm": (lambda w, net: F.layer_norm(w, (8,)), "layer_norm"),
    "at least": (lambda w, net: w.clamp(min=0.2), "clamp"),
}


def zeros_survive(change):
    """The oracle: some elements are zeroed, and as many are zero that were none before."""
    net = Net(change)
    gone = torch.rand(8, 8) < 0.4
    with torch.no_grad():
        net.mask.fill_(True)
        before = net.seen()
        net.w[gone] = 0
        after = net.seen()
    return int(((after == 0) & (before != 0)).sum()) > 0.7 * gone.sum()


@pytest.mark.parametrize("name", [*SURVIVE, *MOVED])
@pytest.mark.parametrize("decomposed", [False, True])
def test_the_map_says_whether_zeros_survive(name, decomposed):
    change, op = (SURVIVE[name], "") if name in SURVIVE else MOVED[name]
    assert zeros_survive(change) == (not op)
    program = export_model(Net(change), (torch.randn(3, 8),))
    weights = fxs.find_weights(program.run_decompositions() if decomposed else program)
    site = weights["w"]
    assert bool(site.lost_zeros) == bool(op)
    if op and not decomposed:
        assert site.lost_zeros == f"zeros do not survive: {op}"
        assert f"w: zeros do not survive: {op}" in str(weights)


def test_zeros_survive_what_the_model_is_made_of():
    def norm(layer):
        return nn.utils.parametrizations.weight_norm(layer)

    model = nn.Sequential(nn.Linear(8, 8), norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (torch.randn(2, 8),), "2:4")
    weights = fxs.find_weights(model, (torch.randn(2, 8),))
    assert len(weights) == 3
    assert not any(site.lost_zeros for site in weights.sites)


def subject_of(kind, model, inputs):
    return export_model(model, inputs) if kind == "program" else model


@pytest.mark.parametrize("kind", ["module", "program"])
@pytest.mark.parametrize("mapping", ["unstructured 50%", {"global": "rows 50%"}, None])
def test_a_weight_that_loses_its_zeros_stays_dense(kind, mapping, caplog):
    caplog.set_level("INFO")
    model = nn.Sequential(Standardized(4, 8, 3), nn.Conv2d(8, 8, 3))
    x = (torch.randn(2, 4, 8, 8),)
    before = model[0].weight.detach().clone()
    sparsifier = fxs.WeightNormSparsifier()
    subject = fxs.prepare(subject_of(kind, model, x), sparsifier, x, mapping)
    sparsifier.step()
    subject, record = fxs.squash(subject, sparsifier)
    assert list(record) == ["1.weight"]
    assert fxs.verify(subject, record).ok
    assert torch.equal(model[0].weight, before)
    assert "0.weight stays dense: zeros do not survive: sub" in caplog.text


@pytest.mark.parametrize("kind", ["module", "program"])
def test_one_that_is_named_is_masked_and_never_verified(kind, tmp_path):
    model = nn.Sequential(Standardized(4, 8, 3), nn.Conv2d(8, 8, 3))
    x = (torch.randn(2, 4, 8, 8),)
    sparsifier = fxs.WeightNormSparsifier()
    mapping = {"module_name": {"0": "unstructured 50%"}, "global": "unstructured 50%"}
    subject = fxs.prepare(subject_of(kind, model, x), sparsifier, x, mapping)
    sparsifier.step()
    subject, record = fxs.squash(subject, sparsifier)
    assert set(record) == {"0.weight", "1.weight"}
    record.save(tmp_path / "record")
    for known in (record, SparsityRecord.load(tmp_path / "record")):
        found = fxs.verify(subject, known)
        assert not found.ok
        faults = {row.fqn: row.faults for row in found}
        assert faults == {"0.weight": ("zeros do not survive: sub",), "1.weight": ()}


def test_where_nothing_else_can_be_masked():
    model, x = nn.Sequential(Standardized(4, 8, 3)), (torch.randn(2, 4, 8, 8),)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, x, "unstructured 50%")
    sparsifier.step()
    _, record = fxs.squash(model, sparsifier)
    assert not record
    assert bool((model[0].weight != 0).all())


def test_calibrated_pruning_leaves_it_dense():
    model, x = nn.Sequential(Standardized(4, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(2, 4, 8, 8)
    _, report = fxs.prune(model, fxs.WandaSparsifier(), [(x,)], "unstructured 50%")
    assert list(report) == ["1.weight"]
    assert report.dense["0.weight"] == "zeros do not survive: sub"


def test_parametrizations_that_move_zeros():
    class Centred(nn.Module):
        def forward(self, w):
            return w - w.mean(1, keepdim=True)

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrize.register_parametrization(model[0], "weight", Centred())
    weights = fxs.find_weights(model, (torch.randn(2, 8),))
    assert weights["0.weight"].lost_zeros == "zeros do not survive: sub"
    assert Reason.ZEROS.explained
    with pytest.raises((MaskError, MappingError)):
        fxs.prepare(
            model,
            fxs.WeightNormSparsifier(),
            (torch.randn(2, 8),),
            {"module_name": {"0": "2:4"}},
        )


def test_a_shift_by_a_constant_that_is_zero_moves_nothing():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("point", torch.zeros(1))

        def forward(self, x):
            quantized = torch.round(self.w / 0.1 + self.point + torch.tensor(0.0))
            return F.linear(x, quantized * 0.1)

    model, x = Shifted(), (torch.randn(2, 8),)
    assert not fxs.find_weights(model, x)["w"].lost_zeros
    model.point.fill_(2)
    assert fxs.find_weights(model, x)["w"].lost_zeros == "zeros do not survive: add"
