"""Finding the level: what is measured is true, budgets are met, and the model is as it was."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.graph import InputError
from fx_sparsity.lowering import layer_milliseconds, timing
from fx_sparsity.pruning import (
    Budget,
    BudgetError,
    CalibrationError,
    Evaluation,
    Sensitivity,
    agreement,
    search,
    sensitivity,
)
from fx_sparsity.pruning.allocation import divergence
from fx_sparsity.pruning.costs import COSTS
from fx_sparsity.sparsifier import MaskError

CANDIDATES = ("unstructured 40%", "unstructured 70%", "2:4", "rows 50%")


class Small(nn.Module):
    """A table, a convolution, and products."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(12, 16), nn.Conv1d(16, 24, 3, padding=1)
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 8)

    def forward(self, ids):
        x = self.conv(self.table(ids).mT).mT.relu()
        return self.down(self.up(x).relu())


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small(), [(torch.randint(12, (8, 9)),) for _ in range(3)]


@pytest.fixture
def whole(small):
    """Fails a test that leaves the model or the sparsifier other than they were."""
    model, _ = small
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    yield model
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def measured(small, method=None, **options):
    model, batches = small
    options = {"candidates": CANDIDATES, "progress": False} | options
    return sensitivity(model, method or fxs.WandaSparsifier(), batches, **options)


def found(small, evaluation, budget, method=None, **options):
    model, batches = small
    options = {"candidates": CANDIDATES, "progress": False} | options
    return search(model, method or fxs.WandaSparsifier(), batches, evaluation, budget, **options)


def pruned(small, mapping, method):
    model, batches = small
    sparse, report = fxs.prune(copy.deepcopy(model), method, batches, mapping, progress=False)
    return fxs.squash(sparse, method)[0].eval(), report


def data_bytes(model, folder):
    """Of the file that `save` writes, without its header."""
    fxs.save(model, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def zeros(model):
    return sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1) + 0.0


SCORES = {
    "zeros": Evaluation(zeros, "lower", "zeros"),
    "kept": Evaluation(lambda model: -zeros(model), "higher", "kept"),
}
"""Rise and fall with what is pruned."""


# -- what is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [fxs.MagnitudeSparsifier, fxs.SparseGPTSparsifier])
def test_a_sensitivity_is_that_of_the_weight_pruned_by_hand(small, whole, method, tmp_path):
    report = measured(small, method())
    model, batches = small
    dense = copy.deepcopy(model).eval()
    assert list(report) == ["table.weight", "conv.weight", "up.weight", "down.weight"]
    for place, row in enumerate(report.rows):
        assert [candidate.config for candidate in row.candidates] == list(CANDIDATES)
        for candidate in row.candidates[place % 2 :: 2]:
            mapping = fxs.SparsityMapping().set_module_name(row.fqn, candidate.config)
            sparse, _ = pruned(small, mapping, method())
            with torch.no_grad():
                moved = sum(float(divergence(dense(*b), sparse(*b))) for b in batches)
            assert candidate.effect == pytest.approx(moved, rel=1e-4, abs=1e-6)
            assert report.bytes - row.bytes + candidate.bytes == data_bytes(sparse, tmp_path)


def test_a_report_is_plain_data_and_read_back(small, whole):
    report = measured(small)
    read = Sensitivity.from_dict(json.loads(json.dumps(report.to_dict())))
    assert read == report
    assert str(read) == str(report)
    assert "up.weight" in str(report)


def test_what_does_not_fit_is_said(small):
    model, batches = small
    model.up = nn.Linear(24, 32)
    report = measured(small, candidates=("unstructured 50%", "3:7"))
    assert [c.config for c in report["up.weight"].candidates] == ["unstructured 50%"]
    assert any("3:7 does not fit: up.weight" in note for note in report.notes)
    assert measured(small, candidates="2:4").rows == measured(small, candidates=["2:4"]).rows
    only = measured(small, candidates=lambda site: ["3:7"] if "up" in site.fqn else ["2:4"])
    assert only.dense == {"up.weight": "none of its candidates fits"}
    some = measured(small, candidates=lambda site: ["2:4"] if "up" in site.fqn else [])
    assert list(some) == ["up.weight"]
    assert set(some.dense) == {"table.weight", "conv.weight", "down.weight"}


def test_data_that_are_too_few_are_told_in_numbers(small):
    model, _ = small
    few = (model, [(torch.randint(12, (1, 9)),)])
    assert any("9 inputs for 32 columns" in note for note in measured(few).notes)
    assert any("9 inputs" in n for n in measured(few, fxs.SparseGPTSparsifier()).notes)
    assert not any("inputs" in note for note in measured(few, fxs.MagnitudeSparsifier()).notes)


def test_times_are_of_layers_with_kernels(small, whole, monkeypatch):
    asked = []

    def time(site, values, tokens, model_bytes):
        asked.append((site.fqn, tokens))
        if site.kind != "linear":
            return None
        return [float(value.count_nonzero()) for value in values]

    monkeypatch.setattr(COSTS, "layer_time", time)
    plan = found(small, SCORES["zeros"], Budget(milliseconds=700.0), tokens=3)
    assert asked == [
        (fqn, 3) for fqn in ("table.weight", "conv.weight", "up.weight", "down.weight")
    ]
    assert plan.point.milliseconds <= 700 < plan.unpruned.milliseconds
    assert plan.unpruned.milliseconds == 24 * 32 + 32 * 8
    assert {row.fqn for row in plan.rows} <= {"up.weight", "down.weight"}
    with pytest.raises(ValueError, match="tokens: a budget of milliseconds"):
        found(small, SCORES["zeros"], Budget(milliseconds=700.0))


def test_a_layer_takes_the_time_of_what_lowering_would_choose(monkeypatch):
    gains = {"bitmask": (2.0, 0.9), "nm": (1.6, 1.5), "block": (1.2, 1.1)}

    def measure(layer, packed, tokens, **options):
        assert tokens == (3,)
        one = {n: timing.Timing("eager", 100.0, 1.0, *gains[n]) for n in packed}
        return {n: {3: found} for n, found in one.items()}

    monkeypatch.setattr(timing, "measure", measure)
    weights = fxs.find_weights(nn.Linear(64, 64), (torch.randn(1, 64),))
    dense = torch.randn(64, 64)
    half, few = dense.clone(), dense * (torch.rand(64, 64) < 0.2)
    half[:, ::2] = 0
    times = layer_milliseconds(weights["weight"], [dense, half, few], 3, 1 << 20)
    assert times == [0.1, 0.1 / 1.6, 0.1]  # a gain that is not beyond the noise counts for nothing
    turned = replace(weights["weight"], roles=("in", "out"))
    assert layer_milliseconds(turned, [dense, half.t()], 3, 1 << 20) == times[:2]
    half_float = [dense.half(), half.half()]
    assert layer_milliseconds(weights["weight"], half_float, 3, 1 << 20) is None
    table = fxs.find_weights(nn.Embedding(8, 8), (torch.arange(4),))["weight"]
    assert layer_milliseconds(table, [dense], 1, 1 << 20) is None


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_budget_of_scores_is_met_by_what_prune_makes(small, whole, name, share, tmp_path):
    evaluation = SCORES[name]
    calls = []
    counted = Evaluation(lambda m: calls.append(1) or evaluation(m), evaluation.better, name)
    most = sum(p.numel() for n, p in whole.named_parameters() if p.ndim > 1) * share
    limit = most if name == "zeros" else -most
    method = fxs.SparseGPTSparsifier
    plan = found(small, counted, Budget(score=limit), method())
    assert len(calls) == plan.evaluations <= 6
    sparse, report = pruned(small, plan.mapping, method())
    assert evaluation(sparse) == plan.score
    assert evaluation.meets(plan.score, limit)
    assert data_bytes(sparse, tmp_path) == plan.point.bytes < plan.unpruned.bytes
    assert {row.fqn: row.config for row in plan.rows}.keys() == set(report)


def test_a_budget_of_bytes_is_met_and_no_kind_of_plan_is_better(small, whole, tmp_path):
    model, batches = small
    evaluation = agreement(model, batches)
    report = measured(small)
    limit = 0.6 * report.bytes
    plan = found(small, evaluation, Budget(bytes=limit), sensitivity=report)
    sparse, _ = pruned(small, plan.mapping, fxs.WandaSparsifier())
    assert data_bytes(sparse, tmp_path) == plan.point.bytes <= limit
    assert evaluation(sparse) == plan.score
    fitting = [point for point in plan.front.rows if point.score is not None]
    assert plan.score == max(point.score for point in fitting if point.bytes <= limit)
    assert [p.bytes for p in plan.front.rows] == sorted(p.bytes for p in plan.front.rows)[::-1]


def test_a_plan_predicts_the_least_effect_there_is(small):
    report = measured(small)
    limit = 0.7 * report.bytes
    evaluation = Evaluation(lambda model: 0.0, "lower")
    plan = found(small, evaluation, Budget(bytes=limit), sensitivity=report, evaluations=2)
    choices = itertools.product(*([row, *row.candidates] for row in report.rows))
    sums = [
        (
            sum(getattr(c, "effect", 0.0) for c in choice),
            report.other_bytes + sum(c.bytes for c in choice),
        )
        for choice in choices
    ]
    best = min(effect for effect, nbytes in sums if nbytes <= limit)
    assert plan.point.bytes <= limit
    assert best - 1e-9 <= plan.point.effect <= 1.1 * best


def test_a_measurement_serves_several_searches(small, whole):
    report = measured(small)
    for share in (0.9, 0.5):
        limit = share * report.bytes
        plan = found(small, SCORES["zeros"], Budget(bytes=limit), sensitivity=report)
        assert json.loads(json.dumps(plan.to_dict()))["point"]["bytes"] <= limit
    with torch.random.fork_rng():
        other = (nn.Sequential(nn.Linear(9, 9)), [torch.randn(4, 9)])
    with pytest.raises(ValueError, match=r"no weight conv\.weight that may be pruned"):
        found(other, SCORES["zeros"], Budget(bytes=1), sensitivity=report)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3])
def test_an_evaluation_that_raises_leaves_the_model(small, whole, error, call):
    calls = []

    def score(model):
        model.train()
        calls.append(1)
        if len(calls) == call:
            raise error("no more")
        return 1.0

    with pytest.raises(error, match="no more") as caught:
        found(small, Evaluation(score, "lower"), Budget(score=1.0))
    (note,) = [n for n in caught.value.__notes__ if "while evaluating a plan" in n]
    assert ("prunes 0 of 4 weights" in note) == (call == 1)


def test_a_model_that_is_interrupted_while_it_is_measured_is_as_it_was(small, whole):
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt

    handle = whole.up.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        measured(small)
    handle.remove()


def test_nan(small, whole):
    with pytest.raises(CalibrationError, match="score of the dense model is NaN"):
        found(small, Evaluation(lambda model: math.nan, "lower"), Budget(score=1.0))
    broken = Evaluation(lambda model: math.nan if zeros(model) > 500 else 1.0, "higher")
    plan = found(small, broken, Budget(score=0.5))
    assert plan.score == 1.0
    assert any("score was NaN for" in note for note in plan.notes)
    always = Evaluation(lambda model: math.nan if zeros(model) else 1.0, "higher")
    with pytest.raises(BudgetError, match="is a number"):
        found(small, always, Budget(bytes=0.7 * measured(small).bytes))


def test_scores_that_are_not_monotone_are_told(small, whole):
    def score(model):
        return math.cos(zeros(model))

    plan = found(small, Evaluation(score, "higher"), Budget(score=-0.5))
    assert plan.score >= -0.5
    assert plan.point in plan.front.rows
    assert any("score is not monotone" in note for note in plan.notes) or all(
        a.score >= b.score
        for a, b in itertools.pairwise([p for p in plan.front.rows if p.score is not None])
    )
    rising = Evaluation(zeros, "higher", "zeros")
    plan = found(small, rising, Budget(score=0.0))
    assert any("zeros is not monotone" in note for note in plan.notes)


def test_a_budget_that_cannot_be_met_shows_the_nearest_plan(small, whole):
    with pytest.raises(BudgetError, match="the nearest plan has zeros") as caught:
        found(small, SCORES["zeros"], Budget(bytes=100))
    nearest = caught.value.nearest
    assert nearest.point.bytes > 100
    assert nearest.point.bytes == min(point.bytes for point in nearest.front.rows)
    assert nearest.score == zeros(pruned(small, nearest.mapping, fxs.WandaSparsifier())[0])
    with pytest.raises(BudgetError, match="the dense model has zeros 0, the budget is -1"):
        found(small, SCORES["zeros"], Budget(score=-1.0))
    with pytest.raises(BudgetError, match="no pruned model that was tried meets zeros 0") as caught:
        found(small, SCORES["zeros"], Budget(score=0.0))
    assert caught.value.nearest.evaluations <= 6
    assert caught.value.nearest.score > 0


def test_where_nothing_may_be_pruned_all_stays_dense(small, whole):
    with pytest.raises(BudgetError, match="no pruned model that was tried") as caught:
        found(small, SCORES["zeros"], Budget(score=1.0), candidates=())
    assert caught.value.nearest.point.pruned == 0
    assert caught.value.nearest.evaluations == 1


def test_what_is_no_input_is_refused(small, whole):
    model, batches = small
    with pytest.raises(ValueError, match="expected one of score, bytes and milliseconds, found 2"):
        Budget(score=1.0, bytes=2.0)
    with pytest.raises(TypeError, match='better="higher"'):
        found(small, zeros, Budget(score=1.0))
    with pytest.raises(ValueError, match="evaluations: expected 2 or more, found 1"):
        found(small, SCORES["zeros"], Budget(score=1.0), evaluations=1)
    with pytest.raises(InputError, match="at least one batch"):
        found((model, []), SCORES["zeros"], Budget(score=1.0))
    with pytest.raises(TypeError, match="needs no data"):
        found(small, SCORES["zeros"], Budget(score=1.0), fxs.WeightNormSparsifier())
    with pytest.raises(TypeError, match="module\\(\\)"):
        found((torch.export.export(model, batches[0]), batches), SCORES["zeros"], Budget(score=1.0))
    masked = fxs.WandaSparsifier()
    sparse, _ = fxs.prune(copy.deepcopy(model), masked, batches, "2:4", progress=False)
    with pytest.raises(MaskError, match=r"table\.weight.* masked already: squash"):
        found((sparse, batches), SCORES["zeros"], Budget(score=1.0))
