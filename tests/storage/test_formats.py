"""Every format, every dtype: what is decoded has the very bits that were encoded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fx_sparsity.storage import (
    FORMATS,
    MOST_EXPANSION,
    Contents,
    FileFormatError,
    remap,
    sizes,
    smallest_format,
)
from fx_sparsity.storage.compressed_tensors import OUTSIDE

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,  # packed int4, too
    torch.int32,
    torch.int64,
    torch.bool,
]
ALL = {**FORMATS, **OUTSIDE}


@pytest.fixture(params=["kernels", "plain"])
def path(request, monkeypatch):
    """Both ways to compute."""
    if request.param == "plain":
        monkeypatch.setenv("FX_SPARSITY_KERNELS", "0")
    return request.param


def random_tensor(shape, dtype, density, seed, unit=(1, 1)):
    """Random bits, NaNs and all; whole units of rows x columns are zero."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    if dtype == torch.bool:
        bits &= 1
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1] if shape else 1
    grid = (-(-rows // unit[0]), -(-columns // unit[1]))
    zero = torch.rand(grid, generator=generator) >= density
    zero = zero.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)[:rows, :columns]
    bits[zero.reshape(shape)] = 0
    return bits.view(dtype).view(shape)


def same_bits(a, b):
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def decoded(form, tensor):
    parts = form.encode(Contents(tensor))
    assert set(parts) == set(form.parts)
    counted = form.check("t", parts, tuple(tensor.shape), tensor.dtype)
    out = torch.full((tensor.numel() * tensor.element_size(),), 0xA5, dtype=torch.uint8)
    out = out.view(tensor.dtype).view(tensor.shape)
    form.decode(parts, counted, out)
    return out, sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("name", ALL)
@given(
    st.lists(st.integers(0, 9) | st.sampled_from([16, 32, 64, 72]), max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 0.02, 0.3, 0.9, 1]),
    st.sampled_from([(1, 1), (1, 2), (32, 32), (16, 1), (1, 64), (4, 4)]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_every_format_is_exact_to_the_bit(name, shape, dtype, density, unit, seed, kernels):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FX_SPARSITY_KERNELS", str(int(kernels)))
        tensor = random_tensor(tuple(shape), dtype, density, seed, unit)
        size = ALL[name].size(Contents(tensor))
        if size is None or size * MOST_EXPANSION < tensor.nbytes:
            return
        out, nbytes = decoded(ALL[name], tensor)
    assert same_bits(out, tensor)
    assert nbytes == size


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.usefixtures("path")
def test_large_tensors_are_cut_into_chunks_at_the_right_places(dtype):
    tensor = random_tensor((771, 1024), dtype, 0.4, 1)
    two_four = tensor.clone()
    two_four.view(-1, 2, 2)[:, :, 0] = 0
    for name, each in (("bitmask", tensor), ("two_four", two_four)):
        out, _ = decoded(FORMATS[name], each)
        assert same_bits(out, each)


@pytest.mark.parametrize(
    ("form", "unit"),
    [("block", (32, 32)), ("block", (16, 1)), ("block", (1, 16)), ("rows", (1, 192)), ("dense", 0)],
)
def test_what_is_regular_is_stored_as_such(form, unit):
    tensor = torch.randn(128, 192, dtype=torch.float32).bfloat16()
    if unit:
        tensor = random_tensor((128, 192), torch.bfloat16, 0.4, 7, unit)
    assert smallest_format(tensor) == form


def test_two_of_four_is_stored_as_such():
    tensor = torch.randn(64, 64).half()
    drop = torch.rand(1024, 4).argsort(1) < 2
    tensor.view(-1, 4)[drop] = 0
    assert smallest_format(tensor) == "two_four"


def test_the_sizes_that_matter():
    for dtype, level, most in (
        (torch.bfloat16, 0.5, 0.57),
        (torch.bfloat16, 0.9, 0.17),
        (torch.int8, 0.5, 0.63),
    ):
        tensor = torch.ones(512, 1024, dtype=dtype)
        tensor.view(-1)[torch.randperm(tensor.numel())[: round(level * tensor.numel())]] = 0
        assert min(sizes(Contents(tensor)).values()) <= most * tensor.nbytes


def test_negative_zeros_come_back():
    tensor = torch.tensor([0.0, -0.0, 0.0, 1.0])
    for name in ("bitmask", "two_four"):
        out, _ = decoded(FORMATS[name], tensor)
        assert torch.equal(torch.signbit(out), torch.signbit(tensor))


def test_where_rows_went():
    tensor = torch.tensor([[0, 0], [1, 0], [0, 0], [0, 2]])
    parts = FORMATS["rows"].encode(Contents(tensor))
    places = remap(parts["kept"], 4)
    assert places.tolist() == [-1, 0, -1, 1]
    assert places.dtype == torch.int32
    assert torch.equal(parts["values"][places[3]], tensor[3])


def test_almost_nothing_is_not_a_bomb():
    tensor = torch.zeros(4096, 4096, dtype=torch.int8)
    assert smallest_format(tensor) == "bitmask"
    parts = FORMATS["block"].encode(Contents(tensor))
    with pytest.raises(FileFormatError, match="t: expected at most .* bytes"):
        FORMATS["block"].check("t", parts, (4096, 4096), torch.int8)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_parts_that_do_not_fit_are_refused(name, data):
    tensor = random_tensor(
        (64, 64), torch.bfloat16, 0.2, 3, (1, 64) if name == "rows" else (32, 32)
    )
    if name in ("two_four", "sparse-24-bitmask"):
        tensor.view(-1, 4)[:, :2] = 0
    form = ALL[name]
    parts = dict(form.encode(Contents(tensor)))
    part = data.draw(st.sampled_from([p for p in form.parts if p != "shape"]))
    broken = parts[part]
    fault = data.draw(st.sampled_from(["short", "long", "dtype", "shape", "bits"]))
    if fault == "short":
        broken = broken[:-1]
    elif fault == "long":
        broken = torch.cat([broken, torch.ones_like(broken[:1])])
    elif fault == "dtype":
        broken = broken.view({1: torch.int8, 2: torch.float16, 8: torch.float64}[broken.itemsize])
    elif fault == "shape":
        broken = broken.unsqueeze(0)
    elif part in ("bitmask", "blocks", "kept"):
        broken = broken.clone()
        broken.view(-1)[data.draw(st.integers(0, broken.numel() - 1))] ^= 1 << data.draw(
            st.integers(0, 7)
        )
    else:
        return
    with pytest.raises(FileFormatError, match="^t: "):
        form.check("t", parts | {part: broken}, (64, 64), torch.bfloat16)
