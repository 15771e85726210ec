"""One level for a whole model: spread by a rule, and met to the element."""

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity import SparsityMapping, prune
from fx_sparsity.pruning.allocation import OWL, ErdosRenyi, GlobalRanking, LeastError, Uniform
from fx_sparsity.pruning.allocation import levels as allocation
from fx_sparsity.pruning.methods import CriterionSparsifier
from tests.pruning.tiny_methods import TinyWanda
from tests.sparsifier.test_base import assert_unchanged, snapshot


def taylor(weight, stats):
    return (weight * stats.gradients).abs()


def wanda(weight, stats):
    return weight.abs() * stats.squares.sqrt().unsqueeze(1)


RULES = {
    "uniform": Uniform,
    "Erdős-Rényi": ErdosRenyi,
    "OWL": lambda: OWL(spread=0.2, multiple=2),
    "magnitude": GlobalRanking,
    "Wanda": lambda: GlobalRanking(wanda, needs={"input_norm"}),
    "Taylor": lambda: GlobalRanking(taylor, needs={"gradient"}),
    "least error": LeastError,
}


def loss(output, batch):
    return output.square().mean()


class Mixed(nn.Module):
    """A table, a grouped convolution, and products of several shapes."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 12, 3, groups=2, padding=1)
        self.up, self.down = nn.Linear(12, 31), nn.Linear(31, 5, bias=False)
        with torch.no_grad():
            self.up.weight.mul_(torch.rand(12) * 4)

    def forward(self, ids):
        x = self.conv(self.table(ids).mT).mT.relu()
        return self.down(self.up(x).relu())


def mixed():
    torch.manual_seed(0)
    return Mixed(), [(torch.randint(11, (4, 9)),) for _ in range(3)]


def zeros_of(sparsifier):
    return {fqn: int((~sparsifier.get_mask(fqn)).sum()) for fqn in sparsifier.names}


def elements_of(model):
    return {n: p.numel() for n, p in model.named_parameters() if p.ndim >= 2}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", [fxs.WandaSparsifier, fxs.SparseGPTSparsifier])
@pytest.mark.parametrize("level", [0.37, 0.8])
def test_the_budget_is_met_to_the_element(rule, method, level):
    model, batches = mixed()
    elements = elements_of(model)
    mapping = SparsityMapping().set_global(f"unstructured {level:.0%}")
    sparsifier = method()
    _, report = prune(model, sparsifier, batches, mapping, allocation=RULES[rule](), loss=loss)
    zeros = zeros_of(sparsifier)
    assert zeros.keys() == elements.keys()
    assert sum(zeros.values()) == round(level * sum(elements.values()))
    assert {row.fqn: round(row.level * elements[row.fqn]) for row in report.rows} == zeros
    if rule != "uniform":
        assert len({row.level for row in report.rows}) > 1


def test_levels_of_a_mapping_are_pooled():
    model, batches = mixed()
    elements = elements_of(model)
    mapping = SparsityMapping().set_global("unstructured 50%")
    mapping.set_module_name("up", "unstructured 90%").set_module_name("table", None)
    sparsifier = fxs.WandaSparsifier()
    prune(model, sparsifier, batches, mapping, allocation=Uniform())
    wanted = 0.9 * elements["up.weight"]
    wanted += 0.5 * (elements["conv.weight"] + elements["down.weight"])
    zeros = zeros_of(sparsifier)
    assert sum(zeros.values()) == round(wanted)
    total = sum(elements[fqn] for fqn in zeros)
    for fqn, count in zeros.items():
        assert abs(count - elements[fqn] * wanted / total) <= 1


def test_rules_see_the_dense_model():
    model, batches = mixed()
    with torch.no_grad():
        x = torch.cat([model.conv(model.table(ids).mT).mT.relu() for (ids,) in batches])
        hidden = model.up(x).relu()
        scores = {
            "up.weight": model.up.weight.abs() * x.flatten(0, 1).norm(dim=0),
            "down.weight": model.down.weight.abs() * hidden.flatten(0, 1).norm(dim=0),
        }
    weights = {n: allocation.Prunable(s.shape, "unstructured") for n, s in scores.items()}
    ratios = {n: allocation.outlier_ratio(s, 2) for n, s in scores.items()}
    expected = allocation.owl(weights, 0.6, ratios, 0.2)
    mapping = SparsityMapping().set_object_type("linear", "unstructured 60%")
    _, report = prune(model, fxs.SparseGPTSparsifier(), batches, mapping, allocation=OWL(0.2, 2))
    assert {row.fqn: row.level for row in report.rows} == {
        name: config.level for name, config in expected.items()
    }


def test_least_error_lowers_the_sum_of_errors():
    mapping = SparsityMapping().set_global("unstructured 70%").set_module_name("table", None)
    sums = []
    for rule in (Uniform(), LeastError((0.3, 0.5, 0.6, 0.7, 0.8, 0.9))):
        model, batches = mixed()
        sparsifier = fxs.SparseGPTSparsifier()
        _, report = prune(model, sparsifier, batches, mapping, allocation=rule, sequential=False)
        sums.append(sum(row.error**2 for row in report.rows))
    assert sums[1] < sums[0]


class Decides(nn.Module):
    """Looks at its data, which no graph can; one layer is never met."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        if x.mean().item() > 1e6:
            x = self.idle(x)
        return self.b(self.a(x).relu())


def test_without_a_graph_and_without_weights_that_nothing_meets():
    torch.manual_seed(0)
    model, sparsifier = Decides(), TinyWanda()
    _, report = prune(model, sparsifier, [(torch.randn(9, 8),)], allocation=OWL(multiple=2))
    assert "observed" in report.reason
    assert report.dense == {"idle.weight": "no input of it was seen"}
    assert sum(zeros_of(sparsifier).values()) == 96


class Interrupted(TinyWanda):
    """Stops at the third weight."""

    left = 2

    def solve(self, weight, stats, tiling, level):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().solve(weight, stats, tiling, level)


@pytest.mark.parametrize("rule", ["Erdős-Rényi", "OWL"])
def test_after_an_interruption_the_rest_of_the_budget_is_spread(rule):
    model, batches = mixed()
    sparsifier = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        prune(model, sparsifier, batches, allocation=RULES[rule]())
    before = zeros_of(sparsifier)
    assert len(before) == 2
    sparsifier.left = 9
    prune(model, sparsifier, batches, allocation=RULES[rule]())
    zeros = zeros_of(sparsifier)
    assert sum(zeros.values()) == round(0.5 * sum(elements_of(Mixed()).values()))
    assert zeros.items() >= before.items()


REFUSED = {
    "up.weight: pattern 2:4 fixes its level": (
        SparsityMapping().set_global("unstructured 50%").set_module_name("up", "2:4"),
        OWL(),
    ),
    "GlobalRanking needs gradients: pass loss=": (None, RULES["Taylor"]()),
    "blocks of one size": (
        SparsityMapping().set_global("unstructured 50%").set_module_name("up", "rows 50%"),
        GlobalRanking(),
    ),
    "675 elements are beyond what was measured": (
        SparsityMapping().set_global("unstructured 99%"),
        type("Short", (LeastError,), {"measure": lambda self, seen: {0.1: 1.0}})(),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_change_nothing(message):
    model, batches = mixed()
    before = snapshot(model)
    mapping, rule = REFUSED[message]
    sparsifier = TinyWanda()
    with pytest.raises(ValueError, match=message):
        prune(model, sparsifier, batches, mapping, allocation=rule)
    assert_unchanged(model, before)
    assert sparsifier.names == []


def test_a_rule_with_a_level_that_is_none():
    with pytest.raises(ValueError, match="between 0 and 1"):
        LeastError((0.5, 1.0))


def test_criteria_of_sparsifiers_are_criteria_of_rankings():
    assert isinstance(fxs.WandaSparsifier(), CriterionSparsifier)
    model, batches = mixed()
    method = fxs.WandaSparsifier()
    rule = GlobalRanking(method.criterion, method.needs)
    prune(model, method, batches, SparsityMapping().set_global("unstructured 50%"), allocation=rule)
    assert sum(zeros_of(method).values()) == round(0.5 * sum(elements_of(Mixed()).values()))
