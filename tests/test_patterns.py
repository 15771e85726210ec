import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fx_sparsity import SparsityConfig
from fx_sparsity.patterns import (
    NM,
    Block,
    Channels,
    Pattern,
    PatternError,
    Rows,
    StorageBlock,
    Tiling,
    Unstructured,
)

LINEAR = ("out", "in")
TRANSPOSED = ("in", "out")
CONV = ("out", "in", "kernel", "kernel")
EXPERTS = ("batch", "in", "out")

remainders = st.sampled_from(["error", "dense", "pad"])
sides = st.tuples(st.integers(1, 40), st.integers(1, 40))
patterns = st.one_of(
    st.sampled_from([Unstructured(), Unstructured("out"), Rows(), Channels()]),
    st.integers(2, 32).flatmap(
        lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m), remainders)
    ),
    sides.flatmap(
        lambda s: st.builds(Block, st.just(s), st.none() | st.integers(0, s[0] * s[1]), remainders)
    ),
    sides.flatmap(
        lambda s: st.builds(StorageBlock, st.just(s), st.none() | st.integers(0, s[0] * s[1]))
    ),
)


@given(patterns)
def test_a_pattern_reads_back_its_own_text(pattern):
    assert Pattern.parse(str(pattern)) == pattern


@given(patterns, st.floats(0, 1))
def test_a_config_reads_back_its_own_text(pattern, level):
    config = SparsityConfig(pattern, None if pattern.implied_level is not None else level)
    read = SparsityConfig.parse(str(config))
    assert read.pattern == config.pattern
    assert read.level == pytest.approx(config.level, rel=1e-9)


@pytest.mark.parametrize(
    ("pattern", "roles", "shape", "extents"),
    [
        ("2:4", LINEAR, (6, 8), (1, 4)),
        ("2:4", TRANSPOSED, (8, 6), (4, 1)),
        ("2:4", CONV, (6, 8, 3, 3), (1, 4, 1, 1)),
        ("2:4", EXPERTS, (2, 8, 6), (1, 4, 1)),
        ("2:4", ("row", "dim"), (6, 8), (1, 4)),
        ("block:2x4", TRANSPOSED, (8, 6), (4, 2)),
        ("block:2x4", CONV, (6, 8, 3, 3), (2, 4, 1, 1)),
        ("rows", LINEAR, (6, 8), (1, 8)),
        ("rows", CONV, (6, 8, 3, 3), (1, 8, 3, 3)),
        ("rows", EXPERTS, (2, 8, 6), (1, 8, 1)),
        ("channels", LINEAR, (6, 8), (6, 1)),
        ("unstructured", CONV, (6, 8, 3, 3), (1, 1, 1, 1)),
        ("unstructured:out", TRANSPOSED, (8, 6), (8, 1)),
    ],
)
def test_a_pattern_speaks_of_roles_not_of_dimensions(pattern, roles, shape, extents):
    assert Pattern.parse(pattern).tiling(shape, roles).extents == extents


def test_two_of_four_goes_from_every_group():
    tiling = NM(1, 4).tiling((6, 8), LINEAR)
    assert tiling.chosen(0.75, 12) == 12
    assert tiling.zeros_in_chosen(0.75, torch.tensor([4, 2, 1])).tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    "text", ["", "4:2", "2:4:8", "block:4", "block:0x4", "2:40", "row", "2:4 x"]
)
def test_malformed_patterns_are_quoted(text):
    with pytest.raises(PatternError):
        Pattern.parse(text)


def test_unknown_pattern_says_what_there_is():
    with pytest.raises(
        PatternError, match=r"unknown pattern 'rowz'; expected one of 'unstructured'"
    ):
        Pattern.parse("rowz")


@pytest.mark.parametrize("level", [-0.1, 1.01, float("nan")])
def test_levels_outside_the_unit_interval_raise(level):
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        SparsityConfig("unstructured", level)


def test_a_level_is_needed_unless_the_pattern_fixes_it():
    with pytest.raises(ValueError, match="needs a level"):
        SparsityConfig("rows")
    with pytest.raises(ValueError, match=r"fixes its level at 0.5"):
        SparsityConfig("2:4", 0.7)
    assert SparsityConfig("2:4").level == 0.5


def test_a_pattern_that_does_not_fit_says_where_and_what_to_do():
    with pytest.raises(
        PatternError, match=r"dimension 1 to be a multiple of 4, found 10.*remainder"
    ):
        NM(2, 4).tiling((6, 10), LINEAR)
    assert NM(2, 4, "dense").tiling((6, 10), LINEAR).remainder == "dense"
    with pytest.raises(PatternError, match="exactly one dimension of role dim or in"):
        NM(2, 4).tiling((4, 4, 4), ("in", "in", "out"))


def test_grid_counts_ragged_edges_by_policy():
    assert Tiling((2, 4), remainder="pad").grid((5, 9)) == (3, 3)
    assert Tiling((2, 4), remainder="dense").grid((5, 9)) == (2, 2)
