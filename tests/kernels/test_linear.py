"""Packed linear layers against dense float64, in every way that torch runs an operator."""

import io
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fx_sparsity.kernels import PACKINGS, PackingError, SparseLinear
from fx_sparsity.kernels.activations import ACTIVATIONS, quantize
from fx_sparsity.kernels.ops import linear_operator

FLOATS = (torch.float32, torch.bfloat16)
QUANTIZED = ("token_symmetric", "token_affine", "tensor_affine")


def sparse(shape, density, dtype, seed=0):
    """A random weight of which about `density` is not zero; half of its zeros are -0.0."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator).mul(kept).to(dtype)
    return (torch.randn(shape, generator=generator) * kept).to(dtype)


def layer(packing="bitmask", shape=(37, 23), density=0.5, dtype=torch.float32, **options):
    weight = sparse(shape, density, dtype)
    if dtype == torch.int8:
        options.setdefault("scale", torch.rand(shape[0]) * 0.01 + 0.001)
    return SparseLinear.from_dense(weight, packing=packing, **options)


def expected(module, x):
    """What a layer should return, in float64 from its dense weight."""
    if module.quantize_input == "none" or not x.numel():
        y = x.double() @ module.dense_weight().double().T
    else:
        codes, scale, zero_point = quantize(x, module.quantize_input)
        y = (codes - zero_point).double() @ module.dense_codes().double().T
        y = y * scale.double() * module.scale.double()
    if module.bias is not None:
        y = y + module.bias.to(x.dtype).double()
    return ACTIVATIONS[module.activation](y)


def assert_close(module, x, y):
    want = expected(module, x)
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    rtol = 2**-7 if x.dtype == torch.bfloat16 else 1e-5
    # Sums of terms that cancel are as exact as the terms are large.
    size = x.abs().double().reshape(-1, x.shape[-1]).amax() if x.numel() else torch.tensor(0.0)
    atol = rtol * float(size) * float(module.dense_weight().double().abs().sum(1).max()) * 0.1
    torch.testing.assert_close(y.double(), want, rtol=rtol, atol=atol + 1e-12)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([*FLOATS, torch.int8]))
    how = draw(st.sampled_from(["none", *QUANTIZED])) if dtype == torch.int8 else "none"
    module = layer(
        shape=(draw(st.integers(1, 70)), draw(st.integers(1, 150))),
        density=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        dtype=dtype,
        quantize_input=how,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
    )
    x_dtype = draw(st.sampled_from(FLOATS)) if dtype == torch.int8 else dtype
    if draw(st.booleans()):
        module.bias = nn.Parameter(torch.randn(module.out_features).to(x_dtype))
    leading = draw(st.sampled_from([(), (0,), (1,), (2, 3), (5,), (17,), (2, 0), (64,)]))
    return module, torch.randn(*leading, module.in_features).to(x_dtype)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_against_float64(case):
    module, x = case
    with torch.no_grad():
        assert_close(module, x, module(x))


@pytest.mark.parametrize("packing", sorted(PACKINGS))
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 70), density=st.sampled_from([0.0, 0.5, 1.0])
)
@settings(max_examples=15, deadline=None)
def test_packs_exactly(packing, dtype, rows, columns, density):
    weight = sparse((rows, columns), density, dtype, rows)
    if packing == "nm":
        weight[:, columns // 2 :] = 0
        weight[:, : columns // 2 : 2] = 0
    parts = PACKINGS[packing].pack(weight)
    PACKINGS[packing].check(parts, weight.shape, dtype)
    back = PACKINGS[packing].unpack(parts, weight.shape, dtype)
    assert torch.equal(back, weight)
    if dtype != torch.int8:
        assert not (back.signbit() & (back == 0)).any()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_check_refuses_what_is_corrupt(dtype):
    weight = sparse((40, 30), 0.5, dtype)
    packing = PACKINGS["bitmask"]
    good = packing.pack(weight)
    mask = good["mask"].flatten()
    flipped = torch.cat([mask[:1] ^ 1, mask[1:]]).view_as(good["mask"])
    outside = good["mask"].clone()
    outside[-1, 0, -1] = 255
    counts = torch.tensor([int(b).bit_count() for b in outside.flatten()]).view(len(outside), -1)
    cases = {
        "mask is": {**good, "mask": good["mask"].int()},
        "mask has shape": {**good, "mask": good["mask"][:-1]},
        "mask is not contiguous": {**good, "mask": good["mask"].mT.contiguous().mT},
        "offsets has shape": {**good, "offsets": good["offsets"][1:]},
        "offsets do not": {**good, "offsets": good["offsets"] + 1},
        "offsets do not follow": {**good, "mask": flipped},
        "values has shape": {**good, "values": good["values"][:-1]},
        "values do not end": {**good, "values": good["values"] + 1},
        "parts are": {"mask": good["mask"]},
        "outside of": {
            "mask": outside,
            "offsets": torch.nn.functional.pad(counts.sum(1).cumsum(0), (1, 0)),
            "values": torch.cat([weight[weight != 0], good["values"][-64 // dtype.itemsize :]]),
        },
    }
    total = int(cases["outside of"]["offsets"][-1])
    cases["outside of"]["values"] = good["values"].new_zeros(total + 64 // dtype.itemsize)
    for message, parts in cases.items():
        with pytest.raises(PackingError, match=message):
            packing.check(parts, weight.shape, dtype)


@pytest.mark.parametrize("how", ["none", *QUANTIZED])
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(how, dtype):
    module = layer(dtype=dtype if how == "none" else torch.int8, quantize_input=how)
    x = torch.randn(3, 23, dtype=dtype, requires_grad=True)
    rest = (module.scale, module.row_sums, torch.randn(37, dtype=dtype), 23, 37, how, "gelu")
    torch.library.opcheck(
        linear_operator(PACKINGS["bitmask"]), (x, *module.parts().values(), *rest)
    )


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradients(activation):
    bias = torch.randn(37, requires_grad=True)
    module = layer(activation=activation, bias=bias)
    x = torch.randn(2, 3, 23, requires_grad=True)
    grad = torch.randn(2, 3, 37)
    module(x).backward(grad)
    dense, exact = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    y = ACTIVATIONS[activation](dense @ module.dense_weight().double().T + exact)
    y.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), dense.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bias.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_refuses_before_packing():
    weight, scale = torch.eye(4), torch.ones(4)
    codes = weight.to(torch.int8)
    for message, options in {
        "packing is 'dense'": {"weight": weight, "packing": "dense"},
        "quantize_input is 'row'": {"weight": codes, "scale": scale, "quantize_input": "row"},
        "activation is 'tanh'": {"weight": weight, "activation": "tanh"},
        "takes no scale": {"weight": weight, "scale": scale},
        "needs a scale": {"weight": codes},
        "needs int8 codes": {"weight": weight, "quantize_input": "token_affine"},
        "bias is [3], expected [4]": {"weight": weight, "bias": torch.ones(3)},
        "scale is [1], expected [4]": {"weight": codes, "scale": scale[:1]},
        "bias is on meta": {"weight": weight, "bias": torch.ones(4, device="meta")},
        "float64": {"weight": weight.double()},
        "3 dimensions": {"weight": weight.unsqueeze(0)},
        "no elements": {"weight": weight[:0]},
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            SparseLinear.from_dense(**{"packing": "bitmask", **options})


def test_refuses_activations():
    module = layer()
    with pytest.raises(TypeError, match=r"activations are torch.float16"):
        module(torch.randn(2, 23).half())
    with pytest.raises(TypeError, match=r"activations are torch.bfloat16, the weight is"):
        module(torch.randn(2, 23).bfloat16())
    with pytest.raises(ValueError, match=r"activations are \[2, 22\], expected \[..., 23\]"):
        module(torch.randn(2, 22))
    with pytest.raises(ValueError, match="activations are on meta, the weight is on cpu"):
        module(torch.randn(2, 23, device="meta"))


def test_state_dict_brings_other_zeros():
    source, target = layer(density=0.9), layer(density=0.1)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer))
    assert torch.equal(target.dense_weight(), source.dense_weight())
    state = source.state_dict()
    state["offsets"] = state["offsets"] + 1
    with pytest.raises(RuntimeError, match="SparseLinear: offsets do not follow"):
        target.load_state_dict(state)
    coded = layer(dtype=torch.int8, quantize_input="token_affine")
    state = coded.state_dict()
    state["row_sums"] = state["row_sums"] + 1
    with pytest.raises(RuntimeError, match="row_sums are not the sums"):
        coded.load_state_dict(state)


def test_converts():
    module = layer(bias=torch.randn(37))
    weight = module.dense_weight()
    assert torch.equal(module.to(torch.bfloat16).dense_weight(), weight.bfloat16())
    x = torch.randn(5, 23).bfloat16()
    with torch.no_grad():
        assert_close(module, x, module(x))
    with pytest.raises(PackingError, match="float16"):
        module.half()
    assert module.weight_dtype == module.values.dtype == torch.bfloat16
    coded = layer(dtype=torch.int8)
    assert coded.to(torch.bfloat16).scale.dtype == torch.float32
    assert coded.values.dtype == torch.int8


def test_counts_bytes():
    module = layer(shape=(64, 64), density=0.5, dtype=torch.bfloat16)
    kept = int(module.dense_weight().count_nonzero())
    assert module.nbytes == 64 * 64 // 8 + 2 * kept + 64 + 8 * 5
