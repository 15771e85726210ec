"""Methods that are a score: which scores, how they rank, and what no token reached."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_sparsity.masks import ScoreError
from fx_sparsity.patterns import Tiling
from fx_sparsity.pruning.methods import (
    CriterionSparsifier,
    FisherSparsifier,
    GradientSparsifier,
    MagnitudeSparsifier,
    MovementSparsifier,
    RandomSparsifier,
    Statistics,
    TaylorSparsifier,
    WandaSparsifier,
)
from fx_sparsity.sparsifier import MaskError
from tests.masks.reference import reference_mask
from tests.pruning.methods.layers import layer, tiling_of

REFERENCES = {
    MagnitudeSparsifier: lambda w, s: abs(w),
    WandaSparsifier: lambda w, s: abs(w) * np.sqrt(s.squares.double().numpy())[:, None],
    GradientSparsifier: lambda w, s: abs(s.gradients.double().numpy()),
    TaylorSparsifier: lambda w, s: abs(s.gradients.double().numpy() * w),
    FisherSparsifier: lambda w, s: w**2 * s.gradient_squares.double().numpy(),
    MovementSparsifier: lambda w, s: -w * s.gradients.double().numpy(),
}


@pytest.mark.parametrize("kind", REFERENCES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "pattern",
    ["2:4", "block:4x4", "block:1x4:2", "rows", "channels", "unstructured:out", "unstructured"],
)
def test_masks_are_those_of_the_scores(kind, pattern):
    weight, stats = layer(16, 32, groups=2)
    tiling = tiling_of(pattern, weight)
    scores = REFERENCES[kind](weight.double().numpy(), stats)
    if kind is WandaSparsifier and pattern == "unstructured":
        tiling_used = Tiling((1, 1, 32), zeros="level")
    else:
        tiling_used = tiling
    expected = reference_mask(scores, tiling_used, 0.5)
    solved = kind().solve(weight, stats, tiling, 0.5)
    assert torch.equal(solved.mask, expected)
    assert torch.equal(solved.weight, torch.where(expected, weight, 0))
    assert solved.notes == ()


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9)),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_wanda_prunes_exactly_the_level_and_rows_alike(shape, level, seed):
    groups, out, width = shape
    weight, stats = layer(out, width, groups, tokens=4, seed=seed)
    mask = WandaSparsifier().solve(weight, stats, tiling_of("unstructured", weight), level).mask
    zeros = (~mask).sum(2).flatten()
    assert int(zeros.sum()) == round(level * weight.numel())
    assert int(zeros.max() - zeros.min()) <= 1
    scores = weight.abs() * stats.squares.sqrt()[:, None]
    kept = scores.where(mask, torch.inf).amin(2)
    gone = scores.where(~mask, -torch.inf).amax(2)
    assert bool((kept >= gone).all())


@pytest.mark.parametrize("pattern", ["unstructured", "channels"])
def test_what_calibration_never_met_goes_first_and_by_magnitude(pattern):
    weight, stats = layer(8, 32)
    unseen = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:12]
    stats.squares[:, unseen] = 0
    fewer, more = (
        WandaSparsifier().solve(weight, stats, tiling_of(pattern, weight), share / 32).mask
        for share in (6, 20)
    )
    assert not more[..., unseen].any()
    assert fewer[..., stats.squares[0] > 0].all()
    magnitude = weight[..., unseen].abs()
    if pattern == "channels":
        magnitude = magnitude.sum(1, keepdim=True).expand_as(magnitude)
    kept = fewer[..., unseen]
    assert (magnitude.where(kept, torch.inf).amin(2) > magnitude.where(~kept, 0).amax(2)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(2, 4), st.integers(1, 6), st.integers(1, 6)),
    st.floats(0, 1),
    st.sampled_from(["unstructured", "rows", "channels"]),
)
def test_a_group_that_no_token_reached(shape, level, pattern):
    groups, out, width = shape
    weight, stats = layer(out, width, groups, tokens=4)
    stats.tokens[1] = 0
    stats.gradients[1] = 0
    tiling = tiling_of(pattern, weight)
    solved = TaylorSparsifier().solve(weight, stats, tiling, level)
    block = {"rows": width, "channels": out}.get(pattern, 1)
    assert int((~solved.mask).sum()) == round(level * weight.numel() / block) * block
    share = float((~solved.mask[1]).sum()) / weight[1].numel()
    assert abs(share - level) <= block / weight[1].numel()
    expected = reference_mask(weight[1:2].abs().numpy(), tiling, share)
    assert torch.equal(solved.mask[1:2], expected)
    (note,) = solved.notes
    assert note.startswith("group 1: no token reached it")
    assert MagnitudeSparsifier().solve(weight, stats, tiling, level).notes == ()


def test_random_masks_repeat_and_differ_by_seed():
    weight, stats = layer(16, 32)
    tiling = tiling_of("unstructured", weight)
    one, again, other = (RandomSparsifier(s).solve(weight, stats, tiling, 0.5) for s in (1, 1, 2))
    assert torch.equal(one.mask, again.mask)
    assert not torch.equal(one.mask, other.mask)
    assert int(one.mask.sum()) == 256


def test_a_criterion_of_ones_own():
    weight, stats = layer(4, 8)

    def mean(weight, stats):
        return stats.sums[:, None] * weight

    sparsifier = CriterionSparsifier(mean, needs={"input_mean"})
    assert sparsifier.needs == {"input_mean"}
    mask = sparsifier.solve(weight, stats, tiling_of("2:4", weight), 0.5).mask
    expected = reference_mask(mean(weight, stats).numpy(), tiling_of("2:4", weight), 0.5)
    assert torch.equal(mask, expected)


def test_refusals():
    weight, stats = layer(4, 8)
    tiling = tiling_of("2:4", weight)
    with pytest.raises(ScoreError, match=r"expected scores of the weight's shape \(1, 4, 8\)"):
        CriterionSparsifier(lambda w, s: w[0]).solve(weight, stats, tiling, 0.5)
    with pytest.raises(ScoreError, match="NaN"):
        CriterionSparsifier(lambda w, s: w * torch.nan).solve(weight, stats, tiling, 0.5)
    with pytest.raises(ValueError, match="expected statistics with `squares`"):
        WandaSparsifier().solve(weight, Statistics(torch.tensor([3])), tiling, 0.5)
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4))
    sparsifier = WandaSparsifier()
    sparsifier.prepare(linear)
    with pytest.raises(MaskError, match=r"0\.weight: WandaSparsifier needs calibration data"):
        sparsifier.step()
