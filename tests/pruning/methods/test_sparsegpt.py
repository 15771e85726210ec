"""SparseGPT against optimal brain surgery in float64; what it reports; what it does to the error."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fx_sparsity.masks import ScoreError, tiling_holds
from fx_sparsity.patterns import PatternError, Tiling
from fx_sparsity.pruning.methods import (
    ReorderedSparseGPTSparsifier,
    SparseGPTSparsifier,
    Statistics,
    WandaSparsifier,
)
from tests.masks.reference import reference_mask
from tests.pruning.methods import plain_methods as reference
from tests.pruning.methods.layers import layer, loss, tiling_of

pytestmark = pytest.mark.usefixtures("path")
PATTERNS = ["unstructured", "2:4", "1:8", "block:4x4", "block:1x4:2", "channels"]


def relative(ours, expected):
    return float((ours.double() - expected).norm() / expected.norm())


def in_proportion(rows, extent, level):
    def share(start, stop):
        ends = [round(level * rows * (at // extent)) for at in (start, stop)]
        return ends[1] - ends[0]

    return share


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_against_optimal_brain_surgery(pattern, seed):
    weight, stats = layer(24, 64, groups=2, seed=seed)
    tiling = tiling_of(pattern, weight)
    matrix = Tiling(tiling.extents[1:], tiling.zeros, tiling.remainder)
    level = 0.625  # of every stretch and group a whole number of blocks
    solved = SparseGPTSparsifier(block_size=16).solve(weight, stats, tiling, level)
    total = 0
    for group in range(2):
        share = in_proportion(24 // matrix.extents[0], matrix.extents[1], level)
        keep, values = reference.sparsegpt(
            weight[group], stats.gram[group], matrix, level, 16, share
        )
        total += int((~keep).sum())
        assert torch.equal(solved.mask[group], keep)
        assert relative(solved.weight[group], values) < 1e-4
    assert int((~solved.mask).sum()) == total
    assert solved.notes == ()


def test_rows_ranked_on_their_own():
    weight, stats = layer(24, 64)
    tiling = tiling_of("unstructured:out", weight)
    solved = SparseGPTSparsifier(block_size=16).solve(weight, stats, tiling, 0.55)
    for row in range(24):
        keep, values = reference.sparsegpt(
            weight[0, row : row + 1],
            stats.gram[0],
            Tiling((1, 1)),
            0.55,
            16,
            in_proportion(1, 1, 0.55),
        )
        assert torch.equal(solved.mask[0, row], keep[0])
        assert relative(solved.weight[0, row], values[0]) < 1e-4


def test_rows_go_by_their_exact_loss():
    weight, stats = layer(24, 64)
    solved = SparseGPTSparsifier().solve(weight, stats, tiling_of("rows", weight), 0.25)
    h = reference.damped(stats.gram[0])
    losses = torch.einsum("oi,ij,oj->o", weight[0].double(), h, weight[0].double())
    kept = torch.ones(24, dtype=torch.bool)
    kept[losses.argsort()[:6]] = False
    assert torch.equal(solved.mask[0], kept[:, None].expand(24, 64))
    assert torch.equal(solved.weight, torch.where(solved.mask, weight, 0))


@pytest.mark.parametrize("kind", [SparseGPTSparsifier, ReorderedSparseGPTSparsifier])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_patterns_hold_with_exact_counts(kind, data):
    groups, out, width = data.draw(
        st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 40))
    )
    pattern = data.draw(
        st.sampled_from(
            [
                *("unstructured", "unstructured:out", "rows", "channels"),
                *("2:4 pad", "2:4 dense", "3:5 pad", "block:3x5 pad", "block:2x4 dense"),
                "block:1x4:2 pad",
            ]
        )
    )
    level = {"2": 0.5, "3": 0.4}.get(pattern[0]) or data.draw(st.floats(0, 1))
    weight, stats = layer(out, width, groups, seed=data.draw(st.integers(0, 9)))
    tiling = tiling_of(pattern, weight)
    solved = kind(block_size=data.draw(st.integers(1, 50))).solve(weight, stats, tiling, level)
    assert tiling_holds(~solved.mask, tiling, level)
    assert not solved.weight[~solved.mask].any()
    if tiling.block_size == 1 and tiling.zeros == "all":
        assert int((~solved.mask).sum()) == round(level * weight.numel())
    ranked = reference_mask(weight.abs().numpy(), tiling, level)
    if tiling.zeros == "level":
        assert int(solved.mask.sum()) == int(ranked.sum())
    assert bool(torch.isfinite(solved.weight).all())


def test_inputs_that_are_always_zero_go_first_and_keep_their_values():
    weight, stats = layer(16, 32)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 1, 2, 9]] = True
    stats.gram[:, dead] = 0
    stats.gram[:, :, dead] = 0
    solved = SparseGPTSparsifier().solve(weight, stats, tiling_of("2:4", weight), 0.5)
    assert solved.notes == ("4 of 32 inputs are always zero; their weights go first",)
    assert not solved.mask[0, :, 9].any()
    # Two of three dead ones go from the first group: the smaller ones.
    gone = ~solved.mask[0, :, :3]
    assert bool((gone.sum(1) == 2).all())
    assert torch.equal((~gone).nonzero()[:, 1], weight[0, :, :3].abs().argmax(1))
    kept = solved.mask[0] & dead
    assert torch.allclose(solved.weight[0][kept], weight[0][kept], rtol=1e-5)
    keep, values = reference.sparsegpt(
        weight[0], stats.gram[0], Tiling((1, 4), zeros="level"), 0.5, 128
    )
    assert torch.equal(solved.mask[0], keep)
    assert relative(solved.weight[0], values) < 1e-4


def test_damping_is_raised_and_reported():
    weight, stats = layer(8, 32, tokens=5)  # a Gram matrix of rank 5
    tiling = tiling_of("2:4", weight)
    solved = SparseGPTSparsifier(damping=0).solve(weight, stats, tiling, 0.5)
    (note,) = solved.notes
    assert "not positive definite with a damping of 0 of the mean diagonal; raised to" in note
    raised = float(note.rpartition(" ")[2])
    again = SparseGPTSparsifier(damping=raised).solve(weight, stats, tiling, 0.5)
    assert torch.equal(solved.weight, again.weight)
    assert bool(torch.isfinite(solved.weight).all())


def test_what_is_no_gram_matrix_is_refused():
    weight, stats = layer(8, 32)
    tiling = tiling_of("2:4", weight)
    for bad in (torch.nan, torch.inf, -1.0):
        stats.gram[0, 3, 3] = bad
        with pytest.raises(ValueError, match="NaN, infinities or a negative diagonal"):
            SparseGPTSparsifier().solve(weight, stats, tiling, 0.5)
    with pytest.raises(ValueError, match="expected statistics with `squares`"):
        SparseGPTSparsifier().solve(weight, Statistics(torch.tensor([9])), tiling, 0.5)
    with pytest.raises(ScoreError, match="NaN"):
        SparseGPTSparsifier().solve(weight * torch.nan, stats, tiling, 0.5)
    with pytest.raises(PatternError, match="within one group"):
        SparseGPTSparsifier().solve(weight, stats, Tiling((2, 1, 1)), 0.5)
    with pytest.raises(ValueError, match="damping"):
        SparseGPTSparsifier(damping=-1)
    with pytest.raises(ValueError, match="block_size"):
        SparseGPTSparsifier(block_size=0)


@pytest.mark.parametrize("kind", [SparseGPTSparsifier, ReorderedSparseGPTSparsifier])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x4"])
def test_inputs_that_never_go_together(kind, pattern):
    """A diagonal Gram matrix is given by `squares` alone, as of a lookup."""
    weight, stats = layer(16, 32)
    stats.gram = None
    tiling = tiling_of(pattern, weight)
    solved = kind().solve(weight, stats, tiling, 0.5)
    scores = (weight.double() ** 2 * stats.squares.double()[:, None]).numpy()
    assert torch.equal(solved.mask, reference_mask(scores, tiling, 0.5))
    assert torch.equal(solved.weight, torch.where(solved.mask, weight, 0))
    assert solved.notes == ("its inputs never go together, so nothing is updated",)


def test_groups_without_inputs():
    weight, stats = layer(16, 32, groups=3)
    stats.tokens[0] = 0
    stats.gram[:2] = 0
    tiling = tiling_of("unstructured", weight)
    solved = SparseGPTSparsifier().solve(weight, stats, tiling, 0.5)
    for group in range(2):
        expected = reference_mask(weight[group].abs().numpy(), Tiling((1, 1)), 0.5)
        assert torch.equal(solved.mask[group], expected)
        assert torch.equal(solved.weight[group], torch.where(expected, weight[group], 0))
    alone = SparseGPTSparsifier().solve(
        weight[2:], Statistics(stats.tokens[2:], gram=stats.gram[2:]), tiling, 0.5
    )
    assert torch.equal(solved.weight[2:], alone.weight)
    assert [note.partition(",")[0] for note in solved.notes] == [
        "group 0: no token reached it",
        "group 1: every input is zero",
    ]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:1x4", "channels"])
def test_errors_below_wandas_and_lower_in_a_better_order(pattern):
    errors = []
    for seed in range(3):
        weight, stats = layer(96, 256, seed=seed)
        tiling = tiling_of(pattern, weight)
        methods = WandaSparsifier(), SparseGPTSparsifier(), ReorderedSparseGPTSparsifier()
        solutions = [method.solve(weight, stats, tiling, 0.5) for method in methods]
        errors.append([loss(weight[0], s.weight[0], stats.gram[0]) for s in solutions])
    wanda, ours, reordered = torch.tensor(errors).unbind(1)
    assert bool((ours < 0.9 * wanda).all())
    assert float((reordered / ours).mean()) < 0.95


def test_nothing_given_is_changed():
    weight, stats = layer(16, 32)
    copies = weight.clone(), stats.gram.clone()
    ReorderedSparseGPTSparsifier().solve(weight, stats, tiling_of("2:4", weight), 0.5)
    assert torch.equal(weight, copies[0])
    assert torch.equal(stats.gram, copies[1])
