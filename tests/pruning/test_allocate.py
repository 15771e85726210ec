"""One level for a whole model: spread by a rule, and met to the element."""

import copy

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity import SparsityMapping, prune
from fx_sparsity.pruning.allocation import (
    OWL,
    ErdosRenyi,
    GlobalRanking,
    LeastError,
    Uniform,
    divergence,
    squared_change,
)
from fx_sparsity.pruning.allocation import levels as allocation
from fx_sparsity.pruning.methods import CriterionSparsifier
from tests.pruning.test_observe import no_graph  # noqa: F401
from tests.pruning.test_stages import stack
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
    ratios = {n: allocation.outlier_ratio([s], 2) for n, s in scores.items()}
    expected = allocation.owl(weights, 0.6, ratios, 0.2)
    mapping = SparsityMapping().set_object_type("linear", "unstructured 60%")
    _, report = prune(model, fxs.SparseGPTSparsifier(), batches, mapping, allocation=OWL(0.2, 2))
    assert {row.fqn: row.level for row in report.rows} == {
        name: config.level for name, config in expected.items()
    }


def owl_by_hand(model, batches, level, spread, multiple):
    """FQN -> level, as section 3.2 of arXiv 2310.05175 has it, for blocks of any sizes."""
    inputs = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, layer in linears.items()
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    blocks = {}
    for name, layer in linears.items():
        scores = layer.weight.abs() * torch.cat(inputs[name]).square().mean(0).sqrt()
        block = name.rpartition(".")[0] or name
        blocks.setdefault(block, {})[f"{name}.weight"] = scores.flatten()
    pools = {block: torch.cat([*scores.values()]) for block, scores in blocks.items()}
    ratios = {
        b: float((pool > multiple * pool.mean()).double().mean()) for b, pool in pools.items()
    }
    low, high = min(ratios.values()), max(ratios.values())
    density = {b: (r - low) / (high - low) * 2 * spread for b, r in ratios.items()}
    sizes = {block: pool.numel() for block, pool in pools.items()}
    mean = sum(density[b] * sizes[b] for b in sizes) / sum(sizes.values())
    levels = {block: level - density[block] + mean for block in blocks}
    return {fqn: levels[block] for block, scores in blocks.items() for fqn in scores}


def check_owl(report, expected):
    for row in report.rows:
        assert row.level == pytest.approx(expected[row.fqn], abs=0.01), row.fqn
    assert len({round(row.level, 3) for row in report.rows}) > 3


def test_all_weights_of_a_block_get_one_level():
    model, batches = stack()
    for n, layer in enumerate(model.layers):
        layer.up.weight.data[: n + 1] *= 9
    expected = owl_by_hand(model, batches, 0.6, 0.1, 3)
    assert expected["layers.0.up.weight"] == expected["layers.0.down.weight"]
    mapping = SparsityMapping().set_global("unstructured 60%")
    pruned = copy.deepcopy(model)
    _, report = prune(pruned, fxs.SparseGPTSparsifier(), batches, mapping, allocation=OWL(0.1, 3))
    check_owl(report, expected)
    assert sum((p == 0).sum() for p in pruned.parameters() if p.ndim > 1) == 0  # beneath masks
    program = torch.export.export(model.eval(), (), batches[0], dynamic_shapes=rows_of(batches[0]))
    method = fxs.WandaSparsifier()
    _, report = prune(program, method, batches, mapping, allocation=OWL(0.1, 3))
    check_owl(report, expected)
    assert sum(zeros_of(method).values()) == round(0.6 * sum(elements_of(model).values()))


def rows_of(batch):
    return {name: {0: torch.export.Dim.AUTO} if name == "x" else None for name in batch}


@pytest.mark.usefixtures("no_graph")
def test_blocks_of_a_running_model():
    model, batches = stack()
    expected = owl_by_hand(model, batches, 0.5, 0.1, 3)
    _, report = prune(model, TinyWanda(), batches, allocation=OWL(0.1, 3))
    assert "4 blocks of Layer in turn" in report.reason
    check_owl(report, expected)


def outputs(model, batches):
    model.eval()
    with torch.no_grad():
        return [model(**b) if isinstance(b, dict) else model(*b) for b in batches]


def distance(model, batches, dense, change=squared_change):
    return sum(float(change(a, b)) for a, b in zip(dense, outputs(model, batches), strict=True))


def test_changes_of_outputs():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    assert squared_change(a, b) == pytest.approx(float((a - b).norm() ** 2), rel=1e-5)
    p, q = (torch.distributions.Categorical(logits=x) for x in (a, b))
    expected = torch.distributions.kl_divergence(p, q).sum()
    assert divergence(a, b) == pytest.approx(float(expected), rel=1e-5)
    a[..., 0] = b[..., 0] = -torch.inf  # classes that a model rules out
    rest = (torch.distributions.Categorical(logits=x[..., 1:]) for x in (a, b))
    expected = torch.distributions.kl_divergence(*rest).sum()
    assert divergence(a, b) == pytest.approx(float(expected), rel=1e-5)
    assert squared_change(a, b) == pytest.approx(float((a - b)[..., 1:].norm() ** 2), rel=1e-5)


@pytest.mark.parametrize("change", [squared_change, divergence])
@pytest.mark.parametrize("make", [mixed, stack])
def test_least_error_is_never_behind_uniform(make, change):
    """Nor behind what its own sensitivities come to, whatever weights do to one another."""
    for level in (0.5, 0.8):
        mapping = SparsityMapping().set_global(f"unstructured {level:.0%}")
        found = []
        for rule in (Uniform(), LeastError(change=change)):
            model, batches = make()
            dense = outputs(model, batches)
            prune(model, fxs.WandaSparsifier(), batches, mapping, allocation=rule)
            found.append(distance(model, batches, dense, change))
        assert found[1] <= found[0] * (1 + 1e-4)


def test_least_error_finds_the_weight_that_matters():
    """Half of a layer is never read: all of it can go, though its own error is that of any other."""

    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.unread = (nn.Linear(32, 32, bias=False) for _ in range(2))

        def forward(self, x):
            return self.read(x) + 1e-3 * self.unread(x)

    torch.manual_seed(0)
    model, batches = Unread(), [(torch.randn(64, 32),)]
    _, report = prune(
        model, fxs.WandaSparsifier(), batches, "unstructured 50%", allocation=LeastError()
    )
    assert report["unread.weight"].level > 0.85
    assert report["read.weight"].level < 0.15


@pytest.mark.usefixtures("no_graph")
def test_a_running_model_is_tried_and_put_back():
    model, batches = stack()
    dense, rest = outputs(model, batches), copy.deepcopy(model)
    method, uniform = fxs.WandaSparsifier(), fxs.WandaSparsifier()
    _, report = prune(model, method, batches, "unstructured 50%", allocation=LeastError())
    assert report.sequential
    for fqn in report:
        name, _, _ = fqn.rpartition(".")
        raw = model.get_submodule(name).parametrizations.weight.original
        assert torch.equal(raw, rest.get_parameter(fqn))  # Wanda changes no value
    prune(rest, uniform, batches, "unstructured 50%", allocation=Uniform())
    assert distance(model, batches, dense) <= distance(rest, batches, dense) * (1 + 1e-4)


@pytest.mark.parametrize("calls", [0, 1, 7, 60, 68])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_model_that_is_tried_is_put_back_when_that_fails(calls, error):
    """While single weights are measured, and while whole allocations are."""
    model, batches = mixed()
    before, left = snapshot(model), [calls]

    def change(dense, found):
        if not left[0]:
            raise error
        left[0] -= 1
        return squared_change(dense, found)

    sparsifier = TinyWanda()
    with pytest.raises(error):
        prune(model, sparsifier, batches, allocation=LeastError(change=change))
    assert_unchanged(model, before)
    assert sparsifier.names == []


@pytest.mark.parametrize("solved", [0, 15, 18, 27])
def test_weights_are_put_back_when_a_trial_is_interrupted(solved):
    """After 16 solutions the model is pruned three times over."""
    model, batches = mixed()
    before, sparsifier = snapshot(model), Interrupted()
    sparsifier.left = solved
    with pytest.raises(KeyboardInterrupt):
        prune(model, sparsifier, batches, allocation=LeastError())
    assert_unchanged(model, before)
    assert sparsifier.names == []
    sparsifier.left = 28
    with pytest.raises(KeyboardInterrupt):
        prune(model, sparsifier, batches, allocation=LeastError())
    assert sparsifier.names == []
    sparsifier.left = 29
    with pytest.raises(KeyboardInterrupt):
        prune(model, sparsifier, batches, allocation=LeastError())
    assert len(sparsifier.names) == 1


def test_models_whose_output_tells_nothing():
    class Says(nn.Module):
        def __init__(self, result):
            super().__init__()
            self.layer, self.result = nn.Linear(4, 4), result

        def forward(self, x):
            return self.result(self.layer(x))

    for result, words in (
        (lambda x: x.argmax(-1), "no floating"),
        (lambda x: x / 0, "not finite"),
        (lambda x: x[:, :1], "several classes"),
    ):
        model, sparsifier = Says(result), TinyWanda()
        before = snapshot(model)
        with pytest.raises(ValueError, match=words):
            prune(model, sparsifier, [(torch.randn(9, 4),)], allocation=LeastError())
        assert_unchanged(model, before)


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
