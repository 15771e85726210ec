"""ALPS in few iterations: against float64, and against ALPS as published."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods import (
    ADMMSparsifier,
    ExactUpdate,
    Pipeline,
    QuickALPSSparsifier,
    ReorderedSparseGPTSparsifier,
    Swaps,
    alps,
)
from tests.pruning.methods import plain_methods as reference
from tests.pruning.methods.layers import layer, loss, tiling_of


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x4", "channels"])
def test_the_mask_is_that_of_float64_and_values_become_least_squares(pattern, monkeypatch):
    monkeypatch.setattr(alps, "_SMALL", 0)
    monkeypatch.setattr(alps, "_quickest", lambda device: torch.float32)
    weight, stats = layer(16, 48, groups=2)
    tiling = tiling_of(pattern, weight)
    matrix = Tiling(tiling.extents[1:], tiling.zeros, tiling.remainder)
    solved = QuickALPSSparsifier(steps=50).solve(weight, stats, tiling, 0.5)
    for group in range(2):
        dense, gram = weight[group], stats.gram[group]
        keep = reference.relaxed_admm(dense, gram, matrix, 0.5, 4, 1.3)
        assert torch.equal(solved.mask[group], keep)
        best = reference.least_squares(dense, gram, keep)
        assert float((solved.weight[group] - best).norm() / best.norm()) < 1e-4
    assert solved.notes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pattern", "level"), [("unstructured", 0.6), ("2:4", 0.5)])
def test_the_error_is_close_to_that_of_alps_in_every_dtype(pattern, level, dtype, monkeypatch):
    monkeypatch.setattr(alps, "_quickest", lambda device: dtype)
    weight, stats = layer(96, 320)
    tiling = tiling_of(pattern, weight)
    published = Pipeline(ADMMSparsifier(), ExactUpdate())
    composed = Pipeline(ReorderedSparseGPTSparsifier(), Swaps())
    quick, longer = QuickALPSSparsifier(), QuickALPSSparsifier(iterations=12)
    ours, more, others, least = (
        loss(weight[0], method.solve(weight, stats, tiling, level).weight[0], stats.gram[0])
        for method in (quick, longer, composed, published)
    )
    assert more < ours < min(1.12 * least, others)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["unstructured", "2:4"]), st.integers(0, 3), st.integers(0, 99))
def test_steps_lower_the_error_and_leave_the_mask(pattern, steps, seed):
    weight, stats = layer(8, 264, seed=seed)
    tiling = tiling_of(pattern, weight)
    fewer, more = (
        QuickALPSSparsifier(steps=count).solve(weight, stats, tiling, 0.5)
        for count in (steps, steps + 1)
    )
    assert torch.equal(fewer.mask, more.mask)
    assert not more.weight[~more.mask].any()
    h = reference.damped(stats.gram[0])
    assert loss(weight[0], more.weight[0], h) <= 1.001 * loss(weight[0], fewer.weight[0], h)


def test_small_layers_are_solved_as_published():
    weight, stats = layer(16, 64, groups=2)
    tiling = tiling_of("2:4", weight)
    solved = QuickALPSSparsifier().solve(weight, stats, tiling, 0.5)
    published = Pipeline(ADMMSparsifier(), ExactUpdate()).solve(weight, stats, tiling, 0.5)
    assert torch.equal(solved.mask, published.mask)
    assert torch.equal(solved.weight, published.weight)


@pytest.mark.parametrize("name", ["iterations", "steps"])
def test_negative_counts_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected none or more, found -1"):
        QuickALPSSparsifier(**{name: -1})
