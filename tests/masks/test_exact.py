"""Every pattern, dtype, layout and path against the reference."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.patterns import PatternError, Tiling
from tests.masks.reference import norm_of, reference_mask

pytestmark = pytest.mark.usefixtures("path")
fuzz = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 6e-8, -6e-8, 1e-45, 3e-39, 65504.0, 0.1, -0.1]
LEVELS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.625, 0.9, 1.0])


@st.composite
def layouts(draw, values):
    """A tensor of any dtype, 1 to 4 dimensions, and a layout that is often not contiguous."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    if len(shape) < 3:
        shape[-1] = draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = torch.from_numpy(values(rng, draw(st.booleans()), shape)).to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "shifted", "last"]))
    if layout == "transposed":
        x = x.transpose(0, -1)
    elif layout == "strided":
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout == "shifted":
        x = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(shape)
    elif layout == "last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    return x


def any_values(rng, special, shape):
    return rng.choice(SPECIAL, shape) if special else rng.standard_normal(shape)


def separable_values(rng, special, shape):
    """Small integers, scaled: block means that differ at all differ by far more than 1e-6."""
    values = rng.integers(0, 4, shape) * rng.choice([-1.0, 1.0], shape)
    return values * 2.0 ** (rng.choice([-10, 0, 10]) if special else 0)


def check(x, tiling, level, rank):
    expected = reference_mask(norm_of(x, rank), tiling, level)
    mask = compute_mask(x, tiling, level, rank)
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert torch.equal(mask, expected)


@fuzz
@given(layouts(any_values), LEVELS, st.sampled_from([Rank.VALUE, Rank.MAGNITUDE]))
def test_unstructured(x, level, rank):
    check(x, Tiling((1,) * x.dim()), level, rank)


@fuzz
@given(layouts(any_values), LEVELS, st.sampled_from([Rank.VALUE, Rank.MAGNITUDE]))
def test_per_row(x, level, rank):
    check(x, Tiling((1, *x.shape[1:]), zeros="level"), level, rank)


@fuzz
@given(layouts(any_values), st.integers(2, 32), st.data())
def test_n_of_m(x, m, data):
    n = data.draw(st.integers(1, m - 1))
    axis = data.draw(st.integers(0, x.dim() - 1))
    extents = tuple(m if dim == axis else 1 for dim in range(x.dim()))
    policy = data.draw(st.sampled_from(["pad", "dense"]))
    check(x, Tiling(extents, "level", policy), 1 - n / m, Rank.MAGNITUDE)


@fuzz
@given(layouts(separable_values), LEVELS, st.sampled_from(Rank), st.data())
def test_blocks(x, level, rank, data):
    extents = tuple(data.draw(st.integers(1, 9)) for _ in x.shape)
    zeros = data.draw(st.one_of(st.just("all"), st.integers(0, int(np.prod(extents)))))
    policy = data.draw(st.sampled_from(["pad", "dense"]))
    check(x, Tiling(extents, zeros, policy), level, rank)


@fuzz
@given(layouts(separable_values), LEVELS, st.sampled_from(Rank), st.integers(0, 3))
def test_slabs(x, level, rank, axis):
    """Rows and channels: blocks that span everything but one dimension."""
    extents = tuple(1 if dim == axis % x.dim() else size for dim, size in enumerate(x.shape))
    check(x, Tiling(extents), level, rank)


@pytest.mark.parametrize("shape", [(8, 64), (7, 66), (3, 2048)])
@pytest.mark.parametrize("zeros", ["all", 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_square_neither_under_nor_overflows(shape, zeros, dtype):
    info = torch.finfo(dtype)
    small = max(info.tiny, 1e-38) * torch.arange(1, 5).repeat(shape[0] * shape[1])
    large = (min(info.max, 3e38) / 64) * torch.arange(1, 5).repeat(shape[0] * shape[1])
    for values in (small, large):
        generator = torch.Generator().manual_seed(0)
        x = values[torch.randperm(len(values), generator=generator)][: shape[0] * shape[1]]
        check(x.view(shape).to(dtype), Tiling((1, 4), zeros, "pad"), 0.5, Rank.SQUARE)


def test_squares_of_single_elements_rank_as_magnitudes():
    x = torch.tensor([3e-30, 1e-30, -2e-30, 4e30, -5e30, 1e-45], dtype=torch.float32)
    mask = compute_mask(x, Tiling((1,)), 0.5, Rank.SQUARE)
    assert mask.tolist() == [True, False, False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["normal", "equal", "two", "half zero", "sorted", "reversed", "spike", "special"]
)
@pytest.mark.parametrize("rank", [Rank.VALUE, Rank.MAGNITUDE])
def test_large(kind, dtype, rank):
    """Sizes at which a sample brackets the threshold, and inputs that its bracket does not fit."""
    n = 300_007
    rng = np.random.default_rng(1)
    values = {
        "normal": rng.standard_normal(n),
        "equal": np.full(n, 0.25),
        "two": rng.choice([0.5, 1.0], n),
        "half zero": rng.standard_normal(n) * rng.choice([0.0, 1.0], n),
        "sorted": np.linspace(-1, 1, n),
        "reversed": np.linspace(1, -1, n),
        "spike": np.where(np.arange(n) % 9 == 0, rng.standard_normal(n), 1e-9),
        "special": rng.choice(SPECIAL, n),
    }[kind]
    x = torch.from_numpy(values).to(dtype)
    order = np.argsort(norm_of(x, rank), kind="stable")
    for k in (1, 2, 1000, n // 2, n // 2 + 1, n - 1):
        expected = torch.ones(n, dtype=torch.bool)
        expected[order[:k]] = False
        assert torch.equal(compute_mask(x, Tiling((1,)), k / n, rank), expected), k


@pytest.mark.parametrize("bits", [16, 8])
def test_every_half_ranks_as_its_value(bits):
    """All 65536 bit patterns of both half precisions, except NaN."""
    dtype = torch.float16 if bits == 16 else torch.bfloat16
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    for rank in (Rank.VALUE, Rank.MAGNITUDE):
        order = np.argsort(norm_of(x, rank), kind="stable")
        for k in range(1, len(x), 2999):
            pruned = (~compute_mask(x, Tiling((1,)), k / len(x), rank)).nonzero().squeeze(1)
            assert np.array_equal(pruned.numpy(), np.sort(order[:k]))


@pytest.mark.parametrize("block", [(1, 4), (4, 4), (16, 16), (3, 5)])
@pytest.mark.parametrize("rank", Rank)
def test_close_block_means_rank_apart(block, rank):
    """Blocks are ordered wherever their scores differ by more than 1e-6 relative."""
    shape = (96, 240)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal(shape)).float()
    mask = compute_mask(x, Tiling(block, remainder="pad"), 0.5, rank)
    scores = torch.from_numpy(norm_of(x, rank))
    means = scores.unfold(0, *2 * block[:1]).unfold(1, *2 * block[1:]).mean((-1, -2))
    kept = mask[:: block[0], :: block[1]]
    assert int((~kept).sum()) == round(0.5 * kept.numel())
    highest, lowest = means[~kept].max(), means[kept].min()
    assert highest <= lowest + 1e-6 * abs(lowest)


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES])
@pytest.mark.parametrize("extents", [(1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_written_in_place(dtype, extents, contiguous):
    x = torch.randn(33, 26)
    for tiling in (Tiling(extents, "all", "dense"), Tiling(extents, "level", "dense")):
        out = torch.full((33, 26) if contiguous else (26, 33), 7).to(dtype)
        out = out if contiguous else out.t()
        result = compute_mask(x, tiling, 0.5, Rank.MAGNITUDE, out=out)
        assert result is out
        assert torch.equal(out, compute_mask(x, tiling, 0.5, Rank.MAGNITUDE).to(dtype))


@pytest.mark.parametrize("tiling", [Tiling((1, 1)), Tiling((16, 16)), Tiling((1, 4), "level")])
def test_mask_that_caches_do_not_hold(tiling):
    """Such a mask is written past them: to any address, and to nothing beside it."""
    x = torch.randn(2064, 2048)
    memory = torch.full((x.numel() + 40,), 7.0)
    for start in (0, 5):
        memory.fill_(7)
        out = memory[start : start + x.numel()].view(x.shape)
        compute_mask(x, tiling, 0.5, Rank.MAGNITUDE, out=out)
        assert torch.equal(out, compute_mask(x, tiling, 0.5, Rank.MAGNITUDE).float())
        assert int((memory == 7).sum()) == 40


def test_empty():
    for shape, extents in itertools.product([(0,), (0, 4), (4, 0)], [1, 2]):
        tiling = Tiling((extents,) * len(shape), "all", "pad")
        assert compute_mask(torch.empty(shape), tiling, 0.5).shape == shape


def test_no_dimensions():
    assert compute_mask(torch.tensor(1.0), Tiling(()), 1.0).item() is False
    assert compute_mask(torch.tensor(1.0), Tiling(()), 0.0).item() is True


def test_remainder_error():
    with pytest.raises(PatternError, match="multiple of 4"):
        compute_mask(torch.randn(3, 5), Tiling((1, 4)), 0.5)
