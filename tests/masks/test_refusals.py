"""What cannot be ranked raises, and changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fx_sparsity import WeightNormSparsifier
from fx_sparsity.masks import Rank, ScoreError, compute_mask, contains_nan
from fx_sparsity.patterns import Tiling

pytestmark = pytest.mark.usefixtures("path")
TILINGS = [Tiling((1, 1)), Tiling((1, 4)), Tiling((1, 4), "level"), Tiling((2, 2), 1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("at", [0, 17, 1023])
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_nan(dtype, tiling, at, nan):
    x = torch.randn(32, 32).to(dtype)
    assert not contains_nan(x, x)
    x.view(-1)[at] = nan
    assert contains_nan(x)
    assert contains_nan(x.t())
    assert contains_nan(torch.ones(3), x)
    out = torch.full((32, 32), 7.0)
    with pytest.raises(ScoreError, match="NaN"):
        compute_mask(x, tiling, 0.5, Rank.MAGNITUDE, out=out)
    assert bool((out == 7).all())


def test_infinity_is_no_nan():
    assert not contains_nan(torch.tensor([float("inf"), -float("inf"), 0.0]))
    assert not contains_nan(torch.tensor([float("inf"), -float("inf")], dtype=torch.bfloat16))


def test_block_of_both_infinities():
    x = torch.ones(4, 4)
    x[1, 0], x[1, 1] = float("inf"), -float("inf")
    out = torch.full((4, 4), 7.0)
    with pytest.raises(ScoreError, match="both inf and -inf"):
        compute_mask(x, Tiling((1, 4)), 0.5, out=out)
    assert bool((out == 7).all())
    kept = compute_mask(x, Tiling((1, 4)), 0.75, Rank.MAGNITUDE)
    assert kept.all(1).tolist() == [False, True, False, False]


def test_arguments():
    with pytest.raises(ScoreError, match="int64"):
        compute_mask(torch.ones(3, dtype=torch.int64), Tiling((1,)), 0.5)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        compute_mask(torch.ones(3), Tiling((1,)), 1.5)
    with pytest.raises(ValueError, match="shape"):
        compute_mask(torch.ones(3), Tiling((1,)), 0.5, out=torch.ones(1, 3))


def test_step_names_the_weight_and_changes_no_mask():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = WeightNormSparsifier(0.5, (1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "1.weight"}])
    with torch.no_grad():
        model[1].parametrizations.weight.original[3, 3] = float("nan")
    with pytest.raises(ScoreError, match=r"1\.weight"):
        sparsifier.step()
    assert bool(sparsifier.get_mask("0.weight").all())


RANKED_IN_PASSING = {
    "elements": (Tiling((1, 1)), 0.5),
    "no element": (Tiling((1, 1)), 0.0),
    "all elements": (Tiling((1, 1)), 1.0),
    "blocks": (Tiling((1, 4)), 0.5),
    "blocks that leave an edge": (Tiling((5, 7), remainder="dense"), 0.5),
    "every block": (Tiling((1, 4), 2), 1.0),
    "some blocks": (Tiling((4, 4), 8), 0.5),
}


@pytest.mark.parametrize(("tiling", "level"), RANKED_IN_PASSING.values(), ids=RANKED_IN_PASSING)
@pytest.mark.parametrize("values", ["spread", "crowded"])
@given(data=st.data())
@settings(max_examples=15)
def test_nan_anywhere_in_many_elements(tiling, level, values, data):
    """More elements than are ranked in one go: there, NaN is noticed while they are ranked."""
    x = torch.randn(512, 512) if values == "spread" else torch.ones(512, 512)
    rank = data.draw(st.sampled_from(list(Rank)))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    nan = data.draw(st.sampled_from([float("nan"), -float("nan")]))
    x = x.to(dtype)
    compute_mask(x, tiling, level, rank)
    place = data.draw(st.integers(0, x.numel() - 1) | st.sampled_from([0, 32767, 32768, 262143]))
    x.view(-1)[place] = nan
    out = torch.full(x.shape, 7.0)
    with pytest.raises(ScoreError, match="contains NaN"):
        compute_mask(x, tiling, level, rank, out=out)
    assert bool((out == 7).all())


def test_infinities_are_no_nan_in_passing():
    x = torch.randn(512, 512)
    x[0, 0], x[511, 511] = float("inf"), -float("inf")
    for rank in Rank:
        kept = compute_mask(x, Tiling((1, 1)), 0.5, rank)
        assert int(kept.sum()) == x.numel() // 2
        assert bool(kept[0, 0])
        assert bool(kept[511, 511]) == (rank is not Rank.VALUE)
