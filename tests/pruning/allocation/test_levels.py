"""Levels of single weights that come to one level of all: exactly, whatever the rule."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fx_sparsity import SparsityMapping
from fx_sparsity.masks import compute_mask
from fx_sparsity.pruning.allocation import levels as allocation
from fx_sparsity.pruning.allocation.levels import Prunable

SCORED = torch.Generator().manual_seed(0)


def zeros_of(weight, config):
    """Counted by the mask engine."""
    scores = torch.rand(tuple(weight.shape), generator=SCORED)
    return int((~compute_mask(scores, weight.tiling, config.level)).sum())


def run(rule, weights, level, seed=0):
    rng = np.random.default_rng(seed)
    if rule == "owl":
        return allocation.owl(weights, level, {n: rng.random() for n in weights}, spread=0.3)
    if rule == "sensitivity":
        errors = {n: {x: rng.random() for x in (0.3, 0.7, 1.0)} for n in weights}
        return allocation.by_sensitivity(weights, level, errors)
    if rule == "global":
        scores = {n: torch.from_numpy(rng.random(w.shape)) for n, w in weights.items()}
        return allocation.global_ranking(weights, level, scores)
    return {"uniform": allocation.uniform, "er": allocation.erdos_renyi}[rule](weights, level)


RULES = ["uniform", "er", "owl", "sensitivity"]
SHAPES = st.lists(
    st.lists(st.integers(1, 24), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
)


@pytest.mark.parametrize("rule", [*RULES, "global"])
@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0, 1), st.integers(0, 99))
def test_the_level_is_met_to_the_element(rule, shapes, level, seed):
    weights = {f"w{i}": Prunable(shape, "unstructured") for i, shape in enumerate(shapes)}
    configs = run(rule, weights, level, seed)
    assert list(configs) == list(weights)
    assert all(0 <= config.level <= 1 for config in configs.values())
    zeros = sum(zeros_of(weights[name], config) for name, config in configs.items())
    assert zeros == round(level * sum(weight.elements for weight in weights.values()))


PATTERNS = {
    "unstructured": (1, 1),
    "unstructured:out": (1, 1),
    "block:2x4": (2, 4),
    "block:3x3 dense": (1, 1),
    "block:4x2:3": (4, 2),
    "rows": (1, 1),
    "channels": (1, 1),
}


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(PATTERNS)), st.integers(1, 5), st.integers(1, 5)),
        min_size=1,
        max_size=6,
    ),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_whole_blocks_stay_below_by_less_than_one(rule, parts, level, seed):
    weights = {
        f"w{i}": Prunable((PATTERNS[p][0] * out, PATTERNS[p][1] * width), p)
        for i, (p, out, width) in enumerate(parts)
    }
    goal = round(level * sum(weight.elements for weight in weights.values()))
    assume(goal <= sum(steps * size for steps, size in (w.steps for w in weights.values())))
    configs = run(rule, weights, level, seed)
    zeros = {name: zeros_of(weights[name], config) for name, config in configs.items()}
    missing = goal - sum(zeros.values())
    open_sizes = [
        w.steps[1] for n, w in weights.items() if zeros[n] + w.steps[1] <= w.steps[0] * w.steps[1]
    ]
    assert missing >= 0
    assert missing == 0 or missing < min(open_sizes, default=np.inf)


def test_erdos_renyi_densities():
    weights = {
        "thin": Prunable((10, 20), "unstructured"),
        "wide": Prunable((300, 400), "unstructured"),
        "conv": Prunable((32, 16, 3, 3), "unstructured"),
    }
    configs = allocation.erdos_renyi(weights, 0.9)
    density = {name: 1 - config.level for name, config in configs.items()}
    expected = (300 + 400) / (300 * 400) / ((32 + 16 + 3 + 3) / (32 * 16 * 9))
    assert density["wide"] / density["conv"] == pytest.approx(expected, rel=1e-3)
    assert density["thin"] > density["conv"] > density["wide"]
    tiny = allocation.erdos_renyi({**weights, "tiny": Prunable((2, 2), "unstructured")}, 0.5)
    assert tiny["tiny"].level == 0


def test_owl_levels():
    weights = {name: Prunable((100, 100), "unstructured") for name in "abc"}
    ratios = {"a": 0.1, "b": 0.2, "c": 0.4}
    configs = allocation.owl(weights, 0.7, ratios, spread=0.08)
    levels = [config.level for config in configs.values()]
    # Outliers rescaled to [0, 2 * spread], turned round, and shifted to the mean of 0.7.
    d = (np.array([0.1, 0.2, 0.4]) - 0.1) / 0.3 * 0.16
    assert levels == pytest.approx(list(0.7 + d.mean() - d), abs=2e-4)
    same = allocation.owl(weights, 0.7, dict.fromkeys("abc", 0.3))
    assert [config.level for config in same.values()] == pytest.approx([0.7] * 3)
    assert allocation.outlier_ratio([torch.tensor([1.0] * 98 + [60.0, 70.0])]) == 0.02


def test_outliers_are_those_of_the_pool():
    """Alone, a weight whose scores are all alike has none; beside a faint one it is one."""
    faint, loud = torch.full((90,), 0.1), torch.full((2, 5), 9.0)
    assert allocation.outlier_ratio([faint]) == allocation.outlier_ratio([loud]) == 0
    assert allocation.outlier_ratio([faint, loud]) == 0.1
    assert allocation.outlier_ratio([faint, loud], multiple=10) == 0
    assert allocation.outlier_ratio([]) == 0


def test_halfway_between_two_levels():
    weights = {n: Prunable((4, 10 * k), "unstructured") for k, n in enumerate("abc", 1)}
    even = allocation.uniform(weights, 0.6)
    other = allocation.owl(weights, 0.6, {"a": 0.3, "b": 0.1, "c": 0.2}, 0.3)
    found = allocation.halfway(weights, 0.6, even, other)
    means = [(even[n].level + other[n].level) / 2 for n in weights]
    assert [config.level for config in found.values()] == pytest.approx(means, abs=0.026)
    zeros = sum(zeros_of(weights[n], config) for n, config in found.items())
    assert zeros == round(0.6 * 240)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_sensitivity_finds_the_least_error(seed):
    """Against every combination of levels, for convex errors measured at all of them."""
    rng = np.random.default_rng(seed)
    weights = {f"w{i}": Prunable((2, 2), "unstructured") for i in range(3)}
    grid = np.arange(5) / 4
    curves = {n: np.concatenate([[0], np.sort(rng.random(4)).cumsum()]) for n in weights}
    errors = {
        n: dict(zip(grid[1:].tolist(), c[1:].tolist(), strict=True)) for n, c in curves.items()
    }
    goal = int(rng.integers(0, 13))
    configs = allocation.by_sensitivity(weights, goal / 12, errors)
    ours = sum(curves[n][round(config.level * 4)] for n, config in configs.items())
    least = min(
        sum(c[k] for c, k in zip(curves.values(), counts, strict=True))
        for counts in itertools.product(range(5), repeat=3)
        if sum(counts) == goal
    )
    assert ours == pytest.approx(least)


def test_a_global_ranking_is_that_of_all_scores_together():
    generator = torch.Generator().manual_seed(3)
    weights = {"a": Prunable((8, 16), "block:2x4"), "b": Prunable((4, 8), "block:4x2")}
    scores = {n: torch.rand(w.shape, generator=generator) for n, w in weights.items()}
    configs = allocation.global_ranking(weights, 0.4, scores)
    means = {
        "a": scores["a"].reshape(4, 2, 4, 4).mean((1, 3)).flatten(),
        "b": scores["b"].reshape(1, 4, 4, 2).mean((1, 3)).flatten(),
    }
    threshold = torch.cat(list(means.values())).sort().values[round(0.4 * 160) // 8 - 1]
    for name, config in configs.items():
        assert config.level == float((means[name] <= threshold).double().mean())


def test_levels_go_into_a_mapping():
    configs = allocation.uniform({"layer.weight": Prunable((7, 11), "unstructured")}, 0.37)
    mapping = SparsityMapping().set_module_name("layer.weight", configs["layer.weight"])
    again = SparsityMapping.from_dict(mapping.to_dict()).to_dict()
    assert again == mapping.to_dict()
    assert round(configs["layer.weight"].level * 77) == round(0.37 * 77)


def test_roles_of_storage_are_heeded():
    stored = Prunable((6, 4), "rows", ("in", "out"))
    assert stored.steps == (4, 6)
    assert Prunable((6, 4), "rows").steps == (6, 4)


def test_refusals():
    plain = Prunable((4, 4), "unstructured")
    with pytest.raises(ValueError, match="b: pattern 2:4 fixes its level"):
        allocation.uniform({"a": plain, "b": Prunable((4, 4), "2:4")}, 0.5)
    with pytest.raises(ValueError, match=r"level lies in \[0, 1\]"):
        allocation.uniform({"a": plain}, 1.5)
    with pytest.raises(ValueError, match="asks for 20 zeros, the patterns allow 16"):
        allocation.erdos_renyi({"a": Prunable((4, 5), "block:4x4 dense")}, 1.0)
    with pytest.raises(ValueError, match="blocks of one size"):
        allocation.global_ranking(
            {"a": plain, "b": Prunable((4, 4), "rows")}, 0.5, {"a": torch.rand(4, 4)}
        )
    with pytest.raises(ValueError, match="4 elements are beyond what was measured"):
        allocation.by_sensitivity({"a": plain}, 0.75, {"a": {0.5: 1.0}})
    with pytest.raises(KeyError, match="'a'"):
        allocation.owl({"a": plain}, 0.5, {})


def test_no_weights_at_all():
    assert all(run(rule, {}, 0.5) == {} for rule in [*RULES, "global"])
