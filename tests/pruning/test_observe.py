"""Without a graph: the same statistics, from the running model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

import fx_sparsity as fxs
from fx_sparsity import prune
from fx_sparsity.graph import InputError
from fx_sparsity.graph.frontends import CaptureError
from tests.coverage import architectures
from tests.models import make
from tests.pruning.tiny_methods import Everything, Recorded, TinyWanda


class Decides(nn.Module):
    """Looks at its data, which no graph can."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.a(x)
        if x.mean().item() > 0:
            x = self.b(x).relu()
        return self.c(x)


@pytest.fixture
def no_graph(monkeypatch):
    def refuse(*args):
        raise CaptureError("no graph for this test")

    import sys

    import fx_sparsity.pruning.prune  # noqa: F401

    monkeypatch.setattr(sys.modules["fx_sparsity.pruning.batches"], "capture_graphs", refuse)


def test_a_model_without_a_graph_is_observed(caplog):
    torch.manual_seed(0)
    model = Decides()
    batches = [(torch.randn(6, 8) + shift,) for shift in (3, -3, 1)]
    dense = copy.deepcopy(model)
    method = Recorded()
    _, report = prune(model, method, batches)
    assert not report.sequential
    assert "the running model was observed" in report.reason
    assert "all at once" in str(report)
    assert "taken at once" in caplog.text
    seen = {"a": [], "b": [], "c": []}
    for name, found in seen.items():
        layer = getattr(dense, name)
        layer.register_forward_pre_hook(lambda m, args, found=found: found.append(args[0]))
    for batch in batches:
        dense(*batch)
    assert len(seen["b"]) < 3
    for fqn, gram in zip(report, method.grams, strict=True):
        x = torch.cat(seen[fqn[0]])
        assert torch.allclose(gram[0], x.T @ x, rtol=1e-4, atol=1e-4)
        assert report[fqn].tokens == len(x)


@pytest.mark.parametrize(
    "name",
    [
        *("recommender", "convnet", "tied", "sequential", "gpt2", "gpt_oss"),
        *("MultiheadAttention", "convolutions", "tables"),
    ],
)
@pytest.mark.parametrize("in_turn", [True, False])
def test_what_is_observed_is_what_the_graph_shows(name, in_turn, no_graph, monkeypatch):
    if name in architectures.NAMES:
        model, args, kwargs = architectures.make(name)
        inputs = kwargs or args
    else:
        model, inputs = make(name)
    observed = Everything()
    _, report = prune(copy.deepcopy(model), observed, [inputs], sequential=in_turn)
    monkeypatch.undo()
    walked = Everything()
    _, expected = prune(model, walked, [inputs], sequential=False)
    assert "no graph" in report.reason
    assert set(report) == set(expected)
    assert report.dense.keys() == expected.dense.keys()
    shown = dict(zip(expected, walked.shown, strict=True))
    for fqn, (weight, stats, _) in zip(report, observed.shown, strict=True):
        other, reference, _ = shown[fqn]
        assert torch.equal(weight, other)
        assert torch.equal(stats.tokens, reference.tokens), fqn
        for kind in ("squares", "sums", "gram"):
            found, wanted = getattr(stats, kind), getattr(reference, kind)
            assert (found is None) == (wanted is None)
            if found is not None:
                assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3), (fqn, kind)


class Views(nn.Module):
    """Packed, cast, masked and picked weights."""

    def __init__(self):
        super().__init__()
        self.packed, self.stack = (
            nn.Parameter(torch.randn(12, 8)),
            nn.Parameter(torch.randn(3, 4, 8)),
        )

    def forward(self, x):
        a, b, c = self.packed.chunk(3)
        x = x + (F.linear(x, a) @ c.t().t().contiguous()).tanh() + F.linear(x, b) @ a
        return torch.bmm(self.stack[torch.tensor([2, 0])], x[:2].unsqueeze(-1))


def test_views_and_copies_are_followed(no_graph, monkeypatch):
    torch.manual_seed(0)
    model, x = Views(), torch.randn(5, 8)
    observed, walked = Everything(), Everything()
    _, report = prune(copy.deepcopy(model), observed, [(x,)])
    monkeypatch.undo()
    _, expected = prune(model, walked, [(x,)], sequential=False)
    for found, wanted in zip(observed.shown, walked.shown, strict=True):
        assert torch.allclose(found[1].gram, wanted[1].gram, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[1].tokens, wanted[1].tokens)


def test_masked_models_are_observed_through_their_masks():
    torch.manual_seed(0)
    model, batches = Decides(), [(torch.randn(6, 8),)]
    nn.init.constant_(model.a.bias, 3)
    fresh = fxs.WeightNormSparsifier()
    fxs.prepare(model, fresh, batches[0], fxs.SparsityMapping().set_global("unstructured 50%"))
    fresh.step()
    x = batches[0][0]
    middle = model.a(x).detach()
    method = Recorded()
    _, report = prune(model, method, batches)
    grams = dict(zip(report, method.grams, strict=True))
    assert torch.allclose(grams["a.weight"][0], x.T @ x, rtol=1e-4, atol=1e-4)
    assert torch.allclose(grams["b.weight"][0], middle.T @ middle, rtol=1e-4, atol=1e-4)


def test_weights_that_nothing_meets_are_left_alone():
    model = Decides()
    with torch.no_grad():
        model.a.bias.fill_(-100)
    before = model.b.weight.clone()
    _, report = prune(model, TinyWanda(), [(torch.randn(6, 8),)])
    assert report.dense == {"b.weight": "no input of it was seen"}
    assert torch.equal(model.b.weight, before)


def test_a_batch_that_the_model_rejects_is_named():
    model = Decides()
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(6, 8),), (torch.randn(6, 7),)]
    with pytest.raises(InputError, match="batch 1: Decides raises RuntimeError"):
        prune(model, TinyWanda(), batches)
    assert model.state_dict().keys() == before.keys()


def test_biases_are_corrected_without_a_graph(no_graph):
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(8, 6), torch.randn(20, 8)),
        (nn.Linear(8, 6), torch.randn(5, 4, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(3, 4, 6, 6)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(3, 4, 6)),
        (Conv1D(5, 8), torch.randn(9, 8)),
    ):
        channels = 1 if isinstance(layer, _ConvNd) else x.ndim - 1
        dims = [d for d in range(x.ndim) if d != channels]
        wanted = layer(x).mean(dims)
        _, report = prune(layer, TinyWanda(), [(x[:2],), (x[2:],)], correct_bias=True)
        assert "observed" in report.reason
        assert torch.allclose(layer(x).mean(dims), wanted, atol=1e-5), layer


class Shared(nn.Module):
    """Biases that do not belong to one use of one weight alone."""

    def __init__(self):
        super().__init__()
        self.twice, self.read, self.one, self.other = (nn.Linear(4, 4) for _ in range(4))
        self.other.bias = self.one.bias

    def forward(self, x):
        x = self.twice(self.twice(x))
        return self.read(x) + self.read.bias + self.one(x) + self.other(x)


def test_biases_that_others_read_are_left_alone(no_graph):
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(9, 4)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    _, report = prune(model, TinyWanda(), [(x,)], correct_bias=True)
    assert len(report) == 4
    assert all(w.notes == ("no bias of its own to correct",) for w in report.rows)
    assert all(torch.equal(model.get_parameter(n), value) for n, value in before.items())
