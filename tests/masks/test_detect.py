import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_sparsity.masks import tightest_pattern
from fx_sparsity.patterns import SparsityConfig

ROLES = ("out", "in")


def zeros_of(text, shape=(128, 128), seed=0):
    """Random blocks of a configuration, made without the mask engine."""
    config = SparsityConfig.parse(text)
    tiling = config.pattern.tiling(shape, ROLES)
    height, width = tiling.extents
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(shape[0] // height, shape[1] // width, generator=generator)
    if tiling.zeros == "level":
        scores = torch.rand(shape[0], shape[1] // width, width, generator=generator)
        drop = round(config.level * width)
        return (scores.argsort(-1).argsort(-1) < drop).reshape(shape)
    chosen = torch.zeros(grid.numel(), dtype=torch.bool)
    chosen[grid.flatten().argsort()[: round(config.level * grid.numel())]] = True
    return chosen.view_as(grid).repeat_interleave(height, 0).repeat_interleave(width, 1)


@pytest.mark.parametrize(
    "text",
    [
        *("rows 50%", "channels 25%", "block:32x32 50%", "block:16x16 50%", "block:4x4 50%"),
        *("block:16x1 50%", "block:1x4 50%", "block:2x2 50%", "2:4", "1:4", "4:8", "1:2"),
        "unstructured 50%",
    ],
)
def test_a_pattern_is_found_again(text):
    assert str(tightest_pattern(zeros_of(text), ROLES)) == text


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.sampled_from(["rows 50%", "block:4x4 50%", "2:4"]))
def test_strays_of_rounding_do_not_hide_it(seed, text):
    zero = zeros_of(text, seed=seed)
    strays = torch.rand(zero.shape, generator=torch.Generator().manual_seed(seed)) < 0.01
    assert str(tightest_pattern(zero | strays, ROLES).pattern) == text.partition(" ")[0]


def test_a_dense_weight_and_an_empty_one():
    assert tightest_pattern(torch.zeros(8, 8, dtype=torch.bool), ROLES) is None
    assert str(tightest_pattern(torch.ones(8, 8, dtype=torch.bool), ROLES)) == "rows 100%"


def test_roles_decide_what_a_row_is():
    zero = zeros_of("rows 50%").t().contiguous()
    assert str(tightest_pattern(zero, ("out", "in"))) == "channels 50%"
    assert str(tightest_pattern(zero, ("in", "out"))) == "rows 50%"


def test_a_shape_that_fits_no_block():
    zero = torch.zeros(5, 7, dtype=torch.bool)
    zero[0, 0] = True
    assert str(tightest_pattern(zero, ROLES).pattern) == "unstructured"
