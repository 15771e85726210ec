"""The verb: what it reports, what it refuses, and what an interruption leaves."""

import copy
import io
import logging

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity import SparsityMapping, prune
from fx_sparsity.graph import InputError
from fx_sparsity.pruning.methods import Solution
from fx_sparsity.sparsifier import MaskError, dense_state_dict
from tests.models import make
from tests.pruning.tiny_methods import (
    LeastSquares,
    Magnitude,
    Method,
    Recorded,
    TinyWanda,
)
from tests.sparsifier.test_base import assert_unchanged, snapshot


def mlp(depth=3, width=8):
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers).eval(), [(torch.randn(20, width),) for _ in range(2)]


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim >= 2}


# -- what comes out ------------------------------------------------------------------------------


def test_masks_are_those_of_the_method():
    model, batches = mlp()
    dense = weights_of(model)
    x = torch.cat([x for (x,) in batches]).double()
    same, report = prune(model, TinyWanda("unstructured:out"), batches)
    assert same is model
    for layer, fqn in zip(model[::2], report, strict=True):
        scores = dense[fqn].double().abs() * x.norm(dim=0)
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep.scatter_(1, scores.argsort(1)[:, 4:], True)
        assert torch.equal(layer.weight != 0, keep)
        assert torch.equal(layer.weight[keep], dense[fqn][keep])
        x = (x.float() @ layer.weight.T + layer.bias).relu().detach().double()


def test_updates_beat_masks_alone():
    """The least squares solution of each row is the best that its mask allows."""
    model, batches = mlp(1)
    mix = torch.randn(8, 8)
    batches = [(x @ mix,) for (x,) in batches]
    x = torch.cat([x for (x,) in batches])
    wanted = model[0](x)
    errors = {}
    for method in (Magnitude(), LeastSquares()):
        pruned, report = prune(copy.deepcopy(model), method, batches)
        errors[type(method)] = float((pruned[0](x) - wanted).detach().norm())
        if report["0.weight"].error is not None:
            lost = wanted - pruned[0](x)
            expected = float(lost.detach().norm() / (wanted - model[0].bias).detach().norm())
            assert report["0.weight"].error == pytest.approx(expected, rel=1e-3)
    assert errors[LeastSquares] < 0.9 * errors[Magnitude]


def test_what_was_pruned_lies_beneath_its_mask():
    model, batches = mlp()
    dense = weights_of(model)
    sparsifier = LeastSquares()
    prune(model, sparsifier, batches)
    for fqn, weight in dense.items():
        keep = sparsifier.get_mask(fqn)
        assert torch.equal(sparsifier.get_data(fqn)[~keep], weight[~keep])
        assert keep.float().mean() == 0.5
    squashed, record = fxs.squash(model, sparsifier)
    assert fxs.verify(squashed, record).ok
    assert record["0.weight"].pattern == "unstructured"


def test_mapping_and_report():
    model, batches = mlp()
    mapping = SparsityMapping().set_global("2:4").set_module_name("2", None)
    _, report = prune(model, Recorded(), batches, mapping)
    assert list(report) == ["0.weight", "4.weight"]
    assert report["4.weight"].pattern == "2:4"
    assert report["4.weight"].level == 0.5
    assert report["4.weight"].tokens == 40
    assert 0 < report["4.weight"].error < 1
    assert dict(report.dense) == {"2.weight": "excluded by name '2'"}
    assert report.sequential
    text = str(report)
    assert "4.weight" in text
    assert "excluded by name" in text
    assert "sequential: 1 graph; 2 batches" in text
    with pytest.raises(KeyError):
        report["2.weight"]
    groups = model[0].weight.view(8, 2, 4)
    assert (groups != 0).sum(-1).eq(2).all()


def test_statistics_in_memory_are_those_of_one_weight():
    model, batches = mlp(6, 16)
    one = (16 * 16 + 16) * 4 + 8
    _, report = prune(model, Recorded(), batches)
    assert report.statistics_bytes == one
    _, report = prune(mlp(6, 16)[0], Recorded(), batches, sequential=False)
    assert report.statistics_bytes == 6 * one
    assert (report.sequential, report.reason) == (False, "asked for")


def test_weights_that_meet_the_same_inputs_share_statistics(monkeypatch):
    from fx_sparsity.pruning import collect

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
            self.o = nn.Linear(4, 8)

        def forward(self, x):
            mixed = (self.q(x)[..., :4] * self.k(x)).softmax(-1) * self.v(x)
            return self.o(mixed)

    added = []
    plain = collect.Collector.add
    monkeypatch.setattr(
        collect.Collector, "add", lambda s, inputs: (added.append(1), plain(s, inputs))
    )
    torch.manual_seed(0)
    model, x, method = Attention(), torch.randn(30, 8), Recorded()
    _, report = prune(model, method, [(x,)])
    assert list(report) == ["q.weight", "k.weight", "v.weight", "o.weight"]
    assert len(added) == 2
    for gram in method.grams[:3]:
        assert torch.allclose(gram[0], x.T @ x, rtol=1e-4, atol=1e-4)
    assert [w.tokens for w in report.rows] == [30] * 4


def test_too_few_inputs_for_a_gram_matrix_are_told_in_numbers(caplog):
    model, _ = mlp(1)
    _, report = prune(copy.deepcopy(model), Recorded(), [(torch.randn(5, 8),)])
    assert "5 inputs for 8 columns: the Gram matrix is singular" in report["0.weight"].notes
    (told,) = report.warnings
    assert told.startswith("1 of 1 weights met fewer inputs than they have columns, the fewest 5")
    assert "calibrate on 2 times as much data" in told
    assert told in str(report)
    assert told in caplog.messages
    _, enough = prune(copy.deepcopy(model), Recorded(), [(torch.randn(8, 8),)])
    assert enough.warnings == ()


def test_parts_of_a_weight_are_pruned_when_they_are_named():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(6, 6)
            self.a, self.b = (nn.Parameter(torch.randn(s)) for s in ((2, 6), (6, 2)))

        def forward(self, x):
            return nn.functional.linear(x, self.base.weight + self.b @ self.a)

    x = torch.randn(9, 6)
    _, report = prune(Merged(), TinyWanda(), [(x,)])
    assert dict(report.dense) == {
        "a": "zeros do not survive: matmul",
        "b": "zeros do not survive: matmul",
        "base.weight": "zeros do not survive: add",
    }
    for name, fqn in (("base", "base.weight"), ("a", "a")):
        mapping = SparsityMapping().set_module_name(name, "unstructured 50%")
        _, report = prune(Merged(), TinyWanda(), [(x,)], mapping)
        assert list(report) == [fqn]


@pytest.mark.parametrize("name", ["convnet", "recommender", "bare", "tied"])
def test_every_kind_of_weight_is_pruned(name):
    model, inputs = make(name)
    weights = fxs.find_weights(model, inputs)
    _, report = prune(model, TinyWanda(), [inputs])
    assert set(report) == set(weights)
    for fqn in report:
        path, _, attribute = fqn.rpartition(".")
        weight = getattr(model.get_submodule(path), attribute)
        assert (weight == 0).sum() == round(weight.numel() / 2)


# -- biases, batch norms, gradients --------------------------------------------------------------


def test_corrected_biases_keep_the_mean():
    model, batches = mlp(2)
    x = torch.cat([x for (x,) in batches])
    wanted = model[0](x).mean(0)
    prune(model, TinyWanda(), batches, correct_bias=True)
    assert torch.allclose(model[0](x).mean(0), wanted, atol=1e-5)
    other, _ = mlp(2)
    prune(other, TinyWanda(), batches)
    assert not torch.allclose(other[0](x).mean(0), wanted, atol=1e-2)


def test_corrected_biases_of_convolutions_and_addmm():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(3, 4, 6, 6)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(3, 4, 6)),
        (Conv1D(5, 8), torch.randn(9, 8)),
    ):
        dims = [d for d in range(layer(x).ndim) if d != 1]
        wanted = layer(x).mean(dims)
        prune(layer, TinyWanda(), [(x,)], correct_bias=True)
        assert torch.allclose(layer(x).mean(dims), wanted, atol=1e-5)


def test_weights_without_a_bias_of_their_own_are_noted():
    model = nn.Linear(4, 4, bias=False)
    _, report = prune(model, TinyWanda(), [(torch.randn(9, 4),)], correct_bias=True)
    assert report["weight"].notes == ("no bias of its own to correct",)


def test_batch_norms_are_measured_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    batches = [(torch.randn(5, 3, 6, 6),) for _ in range(3)]
    prune(model, TinyWanda(), batches, correct_bias=True)
    means = torch.stack([model[0](x).mean((0, 2, 3)) for (x,) in batches])
    assert torch.allclose(model[1].running_mean, means.mean(0), atol=1e-6)
    assert model[1].momentum == 0.1
    assert not model[1].training


class Fisher(Method):
    needs = frozenset({"gradient", "gradient_norm"})

    def __init__(self):
        super().__init__()
        self.shown = []

    def solve(self, weight, stats, tiling, level):
        self.shown.append(stats)
        return Magnitude.solve(self, weight, stats, tiling, level)


def test_a_loss_is_not_asked_where_nothing_is_pruned():
    model, batches = make("convnet")[0], [(torch.randn(2, 4, 8, 8),)]
    mapping = SparsityMapping().set_module_name_regex("nowhere", "2:4")
    _, report = prune(model, Fisher(), batches, mapping, loss=lambda output, batch: output.sum())
    assert not report.rows


def test_gradients_are_those_of_a_backward_pass():
    model, batches = make("convnet")[0], [(torch.randn(2, 4, 8, 8),) for _ in range(2)]
    reference = copy.deepcopy(model)
    model.grouped.weight.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    method = Fisher()
    targets = torch.randn(2, 8)
    loss = lambda output, batch: (output - targets).square().mean() * batch[0].mean()  # noqa: E731
    before = snapshot(model)
    _, report = prune(model, method, batches, loss=loss)
    totals, squares = {}, {}
    for batch in batches:
        reference.zero_grad()
        loss(reference(*batch), batch).backward()
        for fqn, parameter in reference.named_parameters():
            totals[fqn] = totals.get(fqn, 0) + parameter.grad
            squares[fqn] = squares.get(fqn, 0) + parameter.grad.square()
    for fqn, stats in zip(report, method.shown, strict=True):
        assert torch.allclose(stats.gradients.sum(), totals[fqn].sum(), atol=1e-6)
        found, expected = stats.gradient_squares.flatten().sort(), squares[fqn].flatten().sort()
        assert torch.allclose(found.values, expected.values, rtol=1e-4)
    original = model.stem.parametrizations.weight.original
    assert torch.equal(original.grad, torch.ones_like(original))
    assert not model.grouped.parametrizations.weight.original.requires_grad
    assert before


# -- refusals ------------------------------------------------------------------------------------


class Broken(TinyWanda):
    def __init__(self, solution):
        super().__init__()
        self.solution = solution

    def solve(self, weight, stats, tiling, level):
        return self.solution(weight, super().solve(weight, stats, tiling, level))


BROKEN = {
    "expected a mask of shape": lambda w, s: s._replace(mask=s.mask[:, :2]),
    "torch.bool from the method, found": lambda w, s: s._replace(mask=s.mask.float()),
    "expected a weight of shape": lambda w, s: s._replace(weight=s.weight.double()),
    "made NaN or infinite values": lambda w, s: Solution(s.mask, s.weight * float("nan")),
}


def nan_weight(model):
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")


def shared_memory(model):
    model[2].weight = nn.Parameter(model[0].weight.data.t())


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())


REFUSED = {
    "no batch": (None, TinyWanda, [], {}, "expected at least one batch"),
    "a tensor": (None, TinyWanda, torch.randn(32, 8), {}, "found one Tensor; pass a list of"),
    "a dict": (None, TinyWanda, {"input": torch.randn(3, 8)}, {}, "found one dict; pass a list of"),
    "one string": (None, TinyWanda, "xy", {}, "found one str; pass a list of"),
    "a string": (None, TinyWanda, ["x"], {}, "expected a tuple of positional"),
    "shape": (None, TinyWanda, [(torch.randn(3, 5),)], {}, "rejects them"),
    "device": (None, TinyWanda, [(torch.empty(3, 8, device="meta"),)], {}, "on meta, but the"),
    "nan": (
        None,
        TinyWanda,
        [(torch.full((3, 8), float("nan")),)],
        {},
        "0.weight: the calibration",
    ),
    "method": (None, fxs.WeightNormSparsifier, None, {}, "which needs no data; call prepare"),
    "loss": (None, Fisher, None, {}, "needs gradients: pass loss="),
    "no scalar": (None, Fisher, None, {"loss": lambda y, b: y}, "expected a finite scalar"),
    "nan weight": (nan_weight, TinyWanda, None, {}, "2.weight contains NaN"),
    "memory": (shared_memory, TinyWanda, None, {}, "shares memory with"),
    "parametrized": (
        *(parametrized, TinyWanda, None),
        {"mapping": SparsityMapping().set_module_name("2", "unstructured 50%")},
        "parametrized by Identity",
    ),
    "unknown name": (
        *(None, TinyWanda, None),
        {"mapping": SparsityMapping().set_module_name("9", "2:4")},
        "no weight or owning module '9'",
    ),
    "misfit": (
        *(None, TinyWanda, None),
        {"mapping": SparsityMapping().set_global("2:3")},
        "0.weight: pattern 2:3 needs dimension 1",
    ),
    "no pattern": (None, lambda: TinyWanda(None), None, {}, "has no default pattern"),
    **{what: (None, lambda s=s: Broken(s), None, {}, what) for what, s in BROKEN.items()},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case):
    change, method, given, options, message = REFUSED[case]
    model, batches = mlp()
    if change is not None:
        change(model)
    model.train()
    before, sparsifier = snapshot(model), method()
    with pytest.raises((ValueError, TypeError), match=message):
        prune(model, sparsifier, batches if given is None else given, **options)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name].nan_to_num(7), value.nan_to_num(7))
    assert sparsifier.names == []
    assert all(module.training for module in model.modules())


def test_batches_come_in_any_iterable():
    model, batches = mlp()
    x = torch.cat([x for (x,) in batches])
    data = torch.utils.data.TensorDataset(x)
    loader = torch.utils.data.DataLoader(data, batch_size=20)
    masks = []
    for given in (batches, tuple(batches), iter(batches), [x for (x,) in batches], loader):
        method = TinyWanda()
        _, report = prune(copy.deepcopy(model), method, given)
        assert report.batches == 2
        masks.append(method.get_mask("4.weight"))
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_later_batches_are_named():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)).eval()
    before = snapshot(model)
    with pytest.raises(IndexError) as caught:
        prune(model, TinyWanda(), [(torch.tensor([1]),), (torch.tensor([7]),)])
    assert any("in batch 1 of the calibration data" in n for n in caught.value.__notes__)
    assert_unchanged(model, before)


class TwoInputs(nn.Module):
    """The second input reaches its weight after the first has reached its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, x, y):
        return self.first(x).relu() + self.second(y)


WRONG = {
    "width": (torch.randn(3, 8), torch.randn(3, 7)),
    "count": (torch.randn(3, 8), torch.randn(2, 6)),
    "dtype": (torch.randn(3, 8), torch.randn(3, 6, dtype=torch.float64)),
    "layout": (torch.randn(3, 8), torch.randn(3, 6, 2).to_sparse()),
    "arguments": (torch.randn(3, 8),),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("place", [0, 2])
def test_the_form_of_every_batch_is_checked_before_anything_is_pruned(wrong, place):
    torch.manual_seed(0)
    model = TwoInputs()
    before = snapshot(model)
    batches = [(torch.randn(n, 8), torch.randn(n, 6)) for n in (3, 5)]
    batches.insert(place, WRONG[wrong])
    with pytest.raises(InputError, match=f"batch {place}"):
        prune(model, TinyWanda(), batches)
    assert_unchanged(model, before)


def test_models_without_data_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(MaskError, match=r"0.weight has no data, it is on the meta device"):
        prune(model, TinyWanda(), [(torch.randn(2, 4, device="meta"),)])


def test_step_needs_data():
    model, batches = mlp(1)
    sparsifier = TinyWanda()
    prune(model, sparsifier, batches)
    with pytest.raises(MaskError, match="call fx_sparsity.prune"):
        sparsifier.step()


# -- interruptions -------------------------------------------------------------------------------


class Interrupted(TinyWanda):
    """Stops at the third weight."""

    def __init__(self, error=KeyboardInterrupt):
        super().__init__()
        self.left, self.error = 2, error

    def solve(self, weight, stats, tiling, level):
        if not self.left:
            raise self.error("enough")
        self.left -= 1
        return super().solve(weight, stats, tiling, level)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_whole_weights(error, caplog):
    model, batches = mlp(4)
    dense, whole = weights_of(model), copy.deepcopy(model)
    prune(whole, TinyWanda(), batches)
    sparsifier = Interrupted(error)
    with pytest.raises(error) as caught:
        prune(model, sparsifier, batches)
    note = "2 of 4 weights are pruned, the last of them 2.weight; the others are untouched"
    assert any(note in n for n in caught.value.__notes__)
    assert note in caplog.text
    for layer in (0, 2):
        assert torch.equal(model[layer].weight, whole[layer].weight)
    for layer in (4, 6):
        assert torch.equal(model[layer].weight, dense[f"{layer}.weight"])
    assert sparsifier.names == ["0.weight", "2.weight"]
    sparsifier.left = 9
    _, report = prune(model, sparsifier, batches)
    assert list(report) == ["4.weight", "6.weight"]
    assert report.dense["0.weight"] == "pruned already by this sparsifier"
    for layer in (0, 2, 4, 6):
        assert torch.equal(model[layer].weight, whole[layer].weight)


def test_a_saved_state_goes_on():
    model, batches = mlp(4)
    whole = copy.deepcopy(model)
    prune(whole, TinyWanda(), batches)
    sparsifier = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        prune(model, sparsifier, batches)
    file = io.BytesIO()
    torch.save((dense_state_dict(model), sparsifier.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh, _ = mlp(4)
    fresh.load_state_dict(weights)
    resumed = TinyWanda()
    resumed.load_state_dict(state)
    _, report = prune(fresh, resumed, batches)
    assert list(report) == ["4.weight", "6.weight"]
    for layer in (0, 2, 4, 6):
        assert torch.equal(fresh[layer].weight, whole[layer].weight)


def test_a_write_that_is_interrupted_is_undone(monkeypatch):
    """Between mask and weight: the second tensor that is written raises."""
    model, batches = mlp(2)
    dense = weights_of(model)
    sparsifier = LeastSquares()
    plain, calls = torch.Tensor.copy_, []

    def copy_(self, other, *args):
        calls.append(self.dtype)
        if len(calls) == 4 and self.dtype == torch.bool:
            raise KeyboardInterrupt
        return plain(self, other, *args)

    place = sparsifier.place_masks

    def place_masks(*args):
        place(*args)
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)

    monkeypatch.setattr(sparsifier, "place_masks", place_masks)
    with pytest.raises(KeyboardInterrupt):
        prune(model, sparsifier, batches)
    monkeypatch.undo()
    assert calls.count(torch.bool) >= 2
    assert not torch.equal(model[0].weight, dense["0.weight"])
    assert torch.equal(model[2].weight, dense["2.weight"])


def test_progress_is_logged_where_there_is_no_terminal(caplog):
    batches = mlp(2)[1]
    with caplog.at_level(logging.INFO):
        prune(mlp(2)[0], TinyWanda(), batches, progress=False)
        assert "pruning: " not in caplog.text
        prune(mlp(2)[0], TinyWanda(), batches)
    assert "pruning: 2.weight (2 of 2)" in caplog.text
