"""The packings of regular zeros: 2:4 and its kin, and blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_sparsity._native import KERNELS
from fx_sparsity.kernels import PACKINGS, PackingError, SparseLinear
from fx_sparsity.kernels.activations import QUANTIZERS, quantize
from fx_sparsity.kernels.nm import _pattern
from fx_sparsity.kernels.ops import linear_operator
from tests.kernels.levels import LEVELS

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
INTEGER_QUANTIZERS = sorted(name for name, codes in QUANTIZERS.items() if codes == torch.int8)
PATTERNS = ((1, 4), (2, 8), (2, 4), (4, 8))
BLOCKS = ((16, 1), (16, 2), (16, 4), (16, 16), (32, 8), (32, 16), (32, 32), (64, 64))


def values(shape, dtype, generator):
    """Without a zero."""
    if dtype == torch.int8:
        return torch.randint(1, 128, shape, generator=generator).to(dtype)
    return torch.rand(shape, generator=generator).add(0.5).to(dtype)


def by_groups(shape, n, m, dtype, seed=0):
    """A weight that keeps at most `n` of every `m` inputs; zeros are -0.0 where there is one."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    score = torch.rand(rows, -(-columns // m), m, generator=generator)
    kept = torch.zeros_like(score).scatter(-1, score.topk(n).indices, 1).flatten(1)[:, :columns]
    kept *= torch.rand(shape, generator=generator) < 0.9
    weight = values(shape, dtype, generator)
    return torch.where(kept.bool(), weight, -weight.new_zeros(()))


def by_blocks(shape, height, width, density, dtype, seed=0):
    """A weight that keeps about `density` of its blocks; at its edges they are cut."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(-(-shape[0] // height), -(-shape[1] // width), generator=generator)
    kept = (grid < density).repeat_interleave(height, 0).repeat_interleave(width, 1)
    weight = values(shape, dtype, generator)
    return torch.where(kept[: shape[0], : shape[1]], weight, -weight.new_zeros(()))


def check_layer(weight, packing, tokens, quantizer, x_dtype):
    """Packs exactly, and multiplies as float64 does."""
    coded = weight.dtype == torch.int8
    scale = torch.rand(len(weight)) * 0.01 + 0.001 if coded else None
    module = SparseLinear.from_dense(weight, packing=packing, scale=scale, quantize_input=quantizer)
    back = module.dense_codes()
    assert torch.equal(back, weight)
    assert coded or not (back.signbit() & (back == 0)).any()
    PACKINGS[packing].check(module.parts(), weight.shape, weight.dtype)
    x = torch.randn(tokens, weight.shape[1]).to(x_dtype)
    if quantizer == "none":
        want = x.double() @ module.dense_weight().double().T
    else:
        codes, x_scale, zero_point = quantize(x, quantizer)
        want = (codes - zero_point).double() @ weight.double().T * x_scale.double() * scale.double()
    size = x.abs().double() @ module.dense_weight().abs().double().T
    rtol = 2**-7 if x_dtype == torch.bfloat16 else 1e-5
    error = (module(x).double() - want).abs()
    assert (error <= rtol * (want.abs() + 0.1 * size) + 1e-6).all()


@st.composite
def calls(draw):
    """Shape, dtype, and how activations are quantized; a level of the processor."""
    dtype = draw(st.sampled_from(DTYPES))
    coded = dtype == torch.int8
    quantizer = draw(st.sampled_from(["none", *INTEGER_QUANTIZERS])) if coded else "none"
    x_dtype = draw(st.sampled_from(DTYPES[:2])) if coded else dtype
    shape = (draw(st.integers(1, 100)), draw(st.integers(1, 150)))
    tokens = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 16, 17, 40]))
    return shape, dtype, tokens, quantizer, x_dtype, draw(st.sampled_from(LEVELS))


@given(call=calls(), pattern=st.sampled_from(PATTERNS))
@settings(max_examples=50, deadline=None)
def test_groups(call, pattern):
    shape, dtype, tokens, quantizer, x_dtype, cpu = call
    weight = by_groups(shape, *pattern, dtype, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FX_SPARSITY_CPU", cpu)
        check_layer(weight, "nm", tokens, quantizer, x_dtype)


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 9),
    turned=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_groups_are_packed_as_in_plain_torch(shape, dtype, pattern, seed, turned):
    """Bit for bit, zeros that are kept and other strides included; and so are patterns found."""
    assert KERNELS.ready(), KERNELS.state()
    weight = by_groups(shape, *pattern, dtype, seed)
    if turned:
        weight = weight.t().contiguous().t()
    packing = PACKINGS["nm"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fx_sparsity.kernels.nm.packs_natively", lambda weight: False)
        found, plain = _pattern(weight), packing.pack(weight)
    assert _pattern(weight) == found
    parts = packing.pack(weight)
    assert parts.keys() == plain.keys()
    for name, part in parts.items():
        assert part.dtype == plain[name].dtype
        assert torch.equal(part.view(torch.uint8), plain[name].view(torch.uint8)), name


@given(
    call=calls(),
    block=st.sampled_from(BLOCKS),
    density=st.sampled_from([0.0, 0.3, 0.6]),
    slack=st.sampled_from([1.02, 1e9]),  # the latter takes the largest blocks, whatever they store
)
@settings(max_examples=60, deadline=None)
def test_blocks(call, block, density, slack):
    shape, dtype, tokens, quantizer, x_dtype, cpu = call
    weight = by_blocks(shape, *block, density, dtype, tokens)
    if PACKINGS["block"].refusal(weight):  # every block was drawn, or is cut
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FX_SPARSITY_CPU", cpu)
        patch.setattr("fx_sparsity.kernels.block._SLACK", slack)
        check_layer(weight, "block", tokens, quantizer, x_dtype)


def test_the_library_is_what_is_tested():
    assert KERNELS.ready(), KERNELS.state()


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes_follow_the_zeros(dtype):
    group = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}[dtype]
    for (height, width), steps, count in (
        ((32, 16 * group), 16, 2),
        ((64, 64 * group), 16, 2),
        ((32, 4 * group), 4, 2),
        ((16, group), 1, 1),
        ((16, 16 * group), 1, 1),
    ):
        weight = by_blocks((256, 512), height, width, 0.3, dtype)
        parts = PACKINGS["block"].pack(weight)
        assert parts["values"].shape[1:3] == (steps, count)
        assert parts["values"].numel() == int((weight != 0).sum())


def test_refusals():
    dense = torch.ones(40, 40)
    assert "16 outputs x 1 inputs" in PACKINGS["block"].refusal(dense)
    assert "bitmask" in PACKINGS["nm"].refusal(dense)
    three = by_groups((40, 40), 3, 4, torch.float32)
    assert "1:4, 2:8, 2:4, 4:8" in PACKINGS["nm"].refusal(three)
    for name in ("nm", "block"):
        with pytest.raises(PackingError, match=f"{name}: .*bitmask"):
            SparseLinear.from_dense(dense, packing=name)
        assert "no elements" in PACKINGS[name].refusal(dense[:0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_corrupt_groups(dtype):
    weight, packing = by_groups((40, 30), 2, 4, dtype), PACKINGS["nm"]
    good = packing.pack(weight)
    for message, parts in {
        "mask is": {**good, "mask": good["mask"].int()},
        "mask has shape": {**good, "mask": good["mask"][:, :-1]},
        "values are .* cannot share": {**good, "values": good["values"][:-1]},
        "values do not end": {**good, "values": good["values"] + 1},
        "the mask keeps": {**good, "mask": good["mask"] | 255},
        "not at all": {**good, "mask": good["mask"] & 0},
        "parts are": {"mask": good["mask"]},
    }.items():
        with pytest.raises(PackingError, match=message):
            packing.check(parts, weight.shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 4), (32, 32)])
def test_corrupt_blocks(dtype, block):
    weight, packing = by_blocks((75, 259), *block, 0.6, dtype), PACKINGS["block"]
    good = packing.pack(weight)
    offsets, index = good["offsets"], good["index"]
    for message, parts in {
        "values have shape": {**good, "values": good["values"][:, :, :, :8]},
        "values is not contiguous": {**good, "values": good["values"].mT.contiguous().mT},
        "index has shape": {**good, "index": index[:-1]},
        "index is": {**good, "index": index.long()},
        "index leads": {**good, "index": index + 1000},
        "index leads out": {**good, "index": index - 1000},
        "index does not": {**good, "index": index * 0},
        "offsets has shape": {**good, "offsets": offsets[:-1]},
        "offsets do not lead from": {**good, "offsets": offsets + 1},
        "offsets do not lead": {
            **good,
            "offsets": torch.cat([offsets[:1], offsets[1:-1].flip(0), offsets[-1:]]),
        },
        "outside of": {**good, "values": torch.ones_like(good["values"])},
    }.items():
        if message == "values is not contiguous" and weight.dtype == torch.float32:
            continue  # a group of one has no order
        with pytest.raises(PackingError, match=message):
            packing.check(parts, weight.shape, dtype)


@pytest.mark.parametrize("name", ["nm", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(name, dtype):
    make = {"nm": by_groups((37, 24), 2, 4, dtype), "block": by_blocks((37, 24), 16, 4, 0.5, dtype)}
    quantizer, scale = ("token_affine", torch.rand(37)) if dtype == torch.int8 else ("none", None)
    module = SparseLinear.from_dense(
        make[name], packing=name, scale=scale, quantize_input=quantizer
    )
    x_dtype = torch.float32 if dtype == torch.int8 else dtype
    x = torch.randn(3, 24, dtype=x_dtype, requires_grad=True)
    rest = (
        module.scale,
        module.row_sums,
        torch.randn(37, dtype=x_dtype),
        24,
        37,
        quantizer,
        "gelu",
    )
    torch.library.opcheck(linear_operator(PACKINGS[name]), (x, *module.parts().values(), *rest))
