"""Masks as bits: packed by C++ or by plain torch, and only where they are masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_sparsity.masks.bits import pack_mask, unpack_bits

DTYPES = [torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]


@settings(deadline=None)  # the first call may compile
@given(st.integers(0, 700), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1), st.booleans())
def test_a_mask_comes_back(elements, dtype, seed, strided):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(elements, generator=generator) < 0.6
    mask = keep.to(dtype)
    if strided:
        mask = torch.stack((mask, mask), 1)[:, 0]
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(elements / 8)
    assert torch.equal(unpack_bits(packed, mask.shape), keep)
    bits = [int(packed[i // 8]) >> (i % 8) & 1 for i in range(elements)]
    assert bits == keep.int().tolist()
    if elements % 8:
        assert int(packed[-1]) >> elements % 8 == 0


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point])
@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_what_is_no_mask_of_zeros_and_ones_is_not_packed(dtype, value, place):
    mask = torch.ones(100, dtype=dtype)
    mask[place] = value
    assert pack_mask(mask) is None
