"""4-bit codes with scales and zero points by groups: packed exactly, multiplied as float64 does."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fx_sparsity._native import KERNELS
from fx_sparsity.kernels import PackingError, SparseLinear
from fx_sparsity.kernels.activations import quantize
from fx_sparsity.kernels.ops import linear_operator, plain_linear
from fx_sparsity.kernels.packings import INT4
from tests.kernels.levels import LEVELS

QUANTIZERS = ("none", "token_affine", "token_symmetric")


def made(packing, outputs, groups, size, affine, seed=0):
    """Codes beyond their zero points, scales, and zero points, with zeros that the packing takes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, groups * size)
    scale = torch.rand(outputs, groups, generator=generator) * 0.1 + 0.01
    if seed % 2:
        scale = scale.bfloat16()
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    zero_point = None
    if affine:
        zero_point = torch.randint(-8, 8, (outputs, groups), generator=generator).to(torch.int8)
        codes = codes - zero_point.repeat_interleave(size, 1)
    return codes * kept(packing, shape, generator), scale, zero_point


def kept(packing, shape, generator):
    """int8, what the zeros leave."""
    if packing == "dense_int4":
        return torch.ones(shape, dtype=torch.int8)
    if packing == "bitmask_int4":
        return (torch.rand(shape, generator=generator) < 0.4).to(torch.int8)
    if packing == "block_int4":
        grid = torch.rand(-(-shape[0] // 32), -(-shape[1] // 32), generator=generator) < 0.6
        grid[-1, 0] = False
        whole = grid.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return whole[: shape[0], : shape[1]].to(torch.int8)
    if packing == "nm_int4":
        score = torch.rand(shape[0], -(-shape[1] // 4), 4, generator=generator)
        two = torch.zeros_like(score).scatter(-1, score.topk(2).indices, 1).flatten(1)
        two *= torch.rand(two.shape, generator=generator) < 0.9
        return two[:, : shape[1]].to(torch.int8)
    raise AssertionError(packing)


def check_layer(module, weight, scale, x):
    """Against float64."""
    scale = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    codes, x_scale, zero_point = x.double(), torch.ones(1), torch.zeros(1)
    if module.quantize_input != "none":
        codes, x_scale, zero_point = quantize(x, module.quantize_input)
    dense = weight.double() * scale
    values = (codes.double() - zero_point) * x_scale
    want = values @ dense.T
    rtol = 2**-7 if x.dtype == torch.bfloat16 else 1e-5
    bound = rtol * (want.abs() + 0.1 * values.abs() @ dense.abs().T) + 1e-6
    assert ((module(x).double() - want).abs() <= bound).all()


@st.composite
def cases(draw):
    """A weight, and a call."""
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(1, 90)) if groups == 1 else 8 * draw(st.integers(1, 9))
    size = 1030 if size == 90 else size
    return {
        "made": (
            draw(st.integers(1, 70)),
            groups,
            size,
            draw(st.booleans()),
            draw(st.integers(0, 9)),
        ),
        "quantizer": draw(st.sampled_from(QUANTIZERS)),
        "dtype": draw(st.sampled_from((torch.float32, torch.bfloat16))),
        "tokens": draw(st.sampled_from((1, 2, 3, 4, 5, 8, 9, 17))),
        "level": draw(st.sampled_from(LEVELS)),
    }


EDGE = {
    "made": (33, 1, 1, True, 0),
    "quantizer": "none",
    "dtype": torch.float32,
    "tokens": 1,
    "level": LEVELS[0],
}
"""A block of which all but one input lie behind the edge."""


@pytest.mark.parametrize("packing", sorted(INT4))
@example(case=EDGE)
@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_packs_exactly_and_multiplies(packing, case):
    assert KERNELS.ready(), KERNELS.state()
    weight, scale, zero_point = made(packing, *case["made"])
    module = SparseLinear.from_dense(
        weight,
        packing=packing,
        scale=scale,
        zero_point=zero_point,
        quantize_input=case["quantizer"],
    )
    module.check()
    assert torch.equal(module.dense_codes(), weight)
    x = torch.randn(case["tokens"], weight.shape[1]).to(case["dtype"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FX_SPARSITY_CPU", case["level"])
        check_layer(module, weight, scale, x)


def called(packing, quantizer):
    """The operator, and operands."""
    weight, scale, zero_point = made(packing, 37, 2, 32, True)
    module = SparseLinear.from_dense(
        weight, packing=packing, scale=scale, zero_point=zero_point, quantize_input=quantizer
    )
    x = torch.randn(3, 64, requires_grad=True)
    rest = (module.scale, module.row_sums, torch.randn(37), 64, 37, quantizer, "gelu")
    return linear_operator(INT4[packing]), (x, *module.parts().values(), *rest)


@pytest.mark.parametrize("packing", sorted(INT4))
@pytest.mark.parametrize("quantizer", ["none", "token_affine"])
def test_plain_torch_gives_the_same(packing, quantizer):
    operator, operands = called(packing, quantizer)
    plain = plain_linear(INT4[packing], *operands)
    torch.testing.assert_close(operator(*operands), plain)
    plain.sum().backward()
    gradient = operands[0].grad.clone()
    operands[0].grad = None
    operator(*operands).sum().backward()
    if quantizer == "none":
        torch.testing.assert_close(operands[0].grad, gradient)


@pytest.mark.parametrize("packing", sorted(INT4))
def test_schema_and_fake(packing):
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(*called(packing, "token_affine"), test_utils=utils)


@pytest.mark.exhaustive
@pytest.mark.parametrize("packing", sorted(INT4))
@pytest.mark.parametrize("quantizer", ["none", "token_affine"])
def test_opcheck(packing, quantizer):
    torch.library.opcheck(*called(packing, quantizer))


@pytest.mark.parametrize("shape", [(37, 2, 32), (20, 1, 61), (16, 1, 8), (1, 1, 1)])
def test_a_mask_is_packed_as_in_plain_torch(shape):
    assert KERNELS.ready(), KERNELS.state()
    weight, _, _ = made("bitmask_int4", *shape, False)
    packing = INT4["bitmask_int4"]
    plain = packing._pack_plainly(weight, None)
    for name, part in packing.pack(weight).items():
        assert torch.equal(part, plain[name]), name


@pytest.mark.parametrize("packing", sorted(INT4))
def test_state_and_dtypes(packing):
    """A state dict may bring other zeros, groups and dtypes of scales; conversions leave codes be."""
    first = SparseLinear.from_dense(
        *made(packing, 20, 1, 64, False)[:1], packing=packing, scale=torch.rand(20)
    )
    weight, scale, zero_point = made(packing, 20, 2, 32, True, seed=1)
    second = SparseLinear.from_dense(weight, packing=packing, scale=scale, zero_point=zero_point)
    first.load_state_dict(second.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(first(x), second(x))
    moved = first.to(torch.bfloat16)
    assert torch.equal(moved(x), second(x))


@pytest.mark.parametrize("missing", ["parts", "row_sums"])
def test_a_state_in_part_goes_with_what_stays(missing):
    """Sums of a weight's codes are not those of other codes, or scales."""
    layers = []
    for seed in range(2):
        weight, scale, _ = made("dense_int4", 20, 2, 32, False, seed)
        layers.append(
            SparseLinear.from_dense(
                weight, packing="dense_int4", scale=scale, quantize_input="token_affine"
            )
        )
    module, other = layers
    before = module.dense_weight()
    state = other.state_dict()
    for name in module.parts() if missing == "parts" else ["row_sums"]:
        del state[name]
    for given_ in (state, {"scale": other.scale}):
        with pytest.raises(RuntimeError, match="row_sums are not the sums"):
            module.load_state_dict(given_, strict=False)
    assert torch.equal(module.dense_weight(), before)


def test_refusals():
    good = {"packing": "dense_int4", "scale": torch.rand(20, 2)}
    weight = torch.ones(20, 64, dtype=torch.int8)
    for error, message, given_ in (
        (PackingError, "from 8 to 8, four bits hold -8 to 7", {"weight": weight * 8}),
        (PackingError, "float32, not 4-bit codes", {"weight": weight.float()}),
        (ValueError, "need a scale", {"scale": None}),
        (ValueError, r"\[20, 3\]|3 groups of 64", {"scale": torch.rand(20, 3)}),
        (ValueError, r"\[19, 2\], expected \[20, groups\]", {"scale": torch.rand(19, 2)}),
        (ValueError, r"zero points are \[20, 1\]", {"zero_point": weight[:, :1]}),
        (ValueError, "takes no zero points", {"packing": "nm", "zero_point": weight[:, :2]}),
        (
            PackingError,
            "from -9 to 1",
            {"zero_point": weight[:, :2] * -9, "weight": weight * 0 + 10},
        ),
    ):
        arguments = {"weight": weight, **good, **given_}
        if arguments["packing"] == "nm":
            arguments["scale"] = torch.rand(20)
        if message.startswith("from -9"):
            message = "zero points lie outside"
        with pytest.raises(error, match=message):
            SparseLinear.from_dense(arguments.pop("weight"), **arguments)


@pytest.mark.parametrize("packing", sorted(INT4))
def test_corrupt_parts(packing):
    weight, scale, zero_point = made(packing, 20, 2, 32, True)
    module = SparseLinear.from_dense(
        weight,
        packing=packing,
        scale=scale,
        zero_point=zero_point,
        quantize_input="token_affine",
    )
    state = module.state_dict()
    for name, value, message in (
        ("values", state["values"][..., :-1], "values ha"),
        ("values", state["values"].int(), "values is"),
        ("values", state["values"].sum(dtype=torch.uint8), "values ha"),
        ("values", None, "values is a NoneType, expected a tensor"),
        ("zero_points", state["zero_points"][:, :1].contiguous(), "zero_points have shape"),
        ("zero_points", state["zero_points"] + 8, "outside of -8 to 7"),
        ("scale", state["scale"][:, :1].contiguous(), "zero_points have shape"),
        ("scale", state["scale"].double(), "scale is"),
        ("scale", "0.1", "scale is a str, expected a tensor"),
        ("row_sums", state["row_sums"] + 1, "row_sums are not"),
    ):
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict({**state, name: value})
