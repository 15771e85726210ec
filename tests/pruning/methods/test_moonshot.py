"""The layer's error mixed with the loss: against quadratic forms in float64, row by row."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.pruning.methods import (
    ExactUpdate,
    MagnitudeSparsifier,
    Moonshot,
    Pipeline,
    RandomSparsifier,
    ReorderedSparseGPTSparsifier,
    Rounding,
    SparseGPTSparsifier,
    Swaps,
    TaylorSparsifier,
    WandaSparsifier,
)
from tests.masks.reference import reference_mask
from tests.pruning.methods import plain_methods as reference
from tests.pruning.methods.layers import layer, tiling_of


def curvatures(stats, share, group=0):
    """(1 - share) H_jj + share c F_ij of one group, float64 [out, in]; F is an outer product."""
    found = stats.gradient_squares.double()
    squares = stats.gram.diagonal(dim1=1, dim2=2).double()
    fisher = found[group].sum(1).outer(found[group].sum(0)) / found[group].sum()
    return (1 - share) * squares[group] + share * squares.mean() / found.mean() * fisher


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["unstructured", "unstructured:out", "2:4", "block:2x4"]),
    st.floats(0, 0.95),
    st.integers(0, 99),
)
def test_wanda_ranks_by_both_curvatures_and_keeps_every_digit(pattern, share, seed):
    weight, stats = layer(12, 32, seed=seed)
    tiling = tiling_of(pattern, weight)
    solved = Moonshot(WandaSparsifier(), share).solve(weight, stats, tiling, 0.5)
    scores = (weight[0].double().square() * curvatures(stats, share)).sqrt()
    by_row = tiling_of("unstructured:out", weight) if pattern == "unstructured" else tiling
    expected = reference_mask(scores[None].numpy(), by_row, 0.5)
    assert torch.equal(solved.mask, torch.as_tensor(expected))
    assert torch.equal(solved.weight, torch.where(solved.mask, weight, 0.0))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["unstructured", "2:4"]), st.floats(0, 0.9), st.integers(0, 99))
def test_kept_values_are_the_best_for_the_mixed_error_of_each_row(pattern, share, seed):
    weight, stats = layer(6, 24, groups=2, seed=seed)
    method = Pipeline(SparseGPTSparsifier(), Swaps(), ExactUpdate(tolerance=1e-6))
    solved = Moonshot(method, share).solve(weight, stats, tiling_of(pattern, weight), 0.5)
    for group in range(2):
        h = reference.damped(stats.gram[group])
        squares = stats.gram[group].diagonal().double()
        stretch = (curvatures(stats, share, group) / squares).sqrt()
        for row, s in enumerate(stretch):
            mixed, keep = s[:, None] * h * s, solved.mask[group, row]
            goal = mixed[keep] @ weight[group, row].double()
            best = torch.linalg.solve(mixed[keep][:, keep], goal)
            torch.testing.assert_close(
                solved.weight[group, row][keep].double(), best, rtol=1e-3, atol=1e-5
            )
            assert not solved.weight[group, row][~keep].any()


@pytest.mark.parametrize("method", [WandaSparsifier(), ReorderedSparseGPTSparsifier()])
def test_no_share_is_the_method_itself(method):
    weight, stats = layer(16, 32, groups=2)
    tiling = tiling_of("unstructured", weight)
    mixed = Moonshot(method, 0.0).solve(weight, stats, tiling, 0.6)
    alone = method.solve(weight, stats, tiling, 0.6)
    assert torch.equal(mixed.mask, alone.mask)
    assert torch.equal(mixed.weight, alone.weight)


def test_weights_that_no_gradient_reached_are_noted():
    weight, stats = layer(16, 32)
    stats.gradient_squares = torch.zeros_like(weight)
    tiling = tiling_of("2:4", weight)
    solved = Moonshot(SparseGPTSparsifier()).solve(weight, stats, tiling, 0.5)
    alone = SparseGPTSparsifier().solve(weight, stats, tiling, 0.5)
    assert torch.equal(solved.weight, alone.weight)
    assert solved.notes == ("no gradient reached it, so only the error of its outputs counts",)


def test_inputs_that_are_always_zero_go_first():
    weight, stats = layer(16, 32)
    stats.gram[0, 5], stats.gram[0, :, 5], stats.squares[0, 5] = 0, 0, 0
    tiling = tiling_of("unstructured", weight)
    for method in (WandaSparsifier(), SparseGPTSparsifier()):
        solved = Moonshot(method).solve(weight, stats, tiling, 0.5)
        assert not solved.mask[0, :, 5].any()
        assert solved.weight.isfinite().all()


def test_groups_that_no_token_reached_are_ranked_by_magnitude():
    weight, stats = layer(16, 32, groups=2)
    stats.tokens[1], stats.gradient_squares[1], stats.squares[1], stats.gram[1] = 0, 0, 0, 0
    tiling = tiling_of("unstructured", weight)
    expected = MagnitudeSparsifier().solve(
        weight[1:], stats, tiling_of("unstructured", weight[1:]), 0.5
    )
    for method in (WandaSparsifier(), SparseGPTSparsifier()):
        solved = Moonshot(method).solve(weight, stats, tiling, 0.5)
        if isinstance(method, SparseGPTSparsifier):
            assert torch.equal(solved.mask[1:], expected.mask)
        assert torch.equal(solved.weight[1], torch.where(solved.mask[1], weight[1], 0.0))


class Reader(nn.Module):
    """Two layers with eight outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_outputs_that_the_loss_hardly_reads_lose_more():
    torch.manual_seed(0)
    model, care = Reader(), torch.tensor([10.0, 10.0, *[0.1] * 6])
    batches = [(torch.randn(1, 16),) for _ in range(200)]
    with torch.no_grad():
        targets = {batch[0]: model(batch[0]) + torch.randn(1, 8) for batch in batches}

    def loss(output, batch):
        return ((output - targets[batch[0]]) * care).square().sum()

    def harm(method):
        pruned, _ = fxs.prune(
            copy.deepcopy(model), method, batches, "unstructured 50%", loss=loss, progress=False
        )
        x = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return float(((pruned(x) - model(x)) * care).square().sum())

    alone = harm(SparseGPTSparsifier())
    assert harm(Moonshot(SparseGPTSparsifier())) < 0.8 * alone


@pytest.mark.parametrize("method", [MagnitudeSparsifier(), TaylorSparsifier(), RandomSparsifier()])
def test_methods_that_look_at_no_inputs_are_refused(method):
    with pytest.raises(ValueError, match=f"found {type(method).__name__}, which looks at no input"):
        Moonshot(method)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match="share: expected a number from 0 to below 1"):
        Moonshot(WandaSparsifier(), share)


def test_a_method_that_rounds_is_refused():
    rounding = Pipeline(SparseGPTSparsifier(), Rounding())
    with pytest.raises(ValueError, match="Pipeline rounds to a grid"):
        Moonshot(rounding)
    assert Pipeline(Moonshot(SparseGPTSparsifier()), Rounding()).grid is not None
