"""Packed linear layers against dense float64, in every way that torch runs an operator."""

import copy
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import MappingType, PerRow
from torchao.quantization.quantize_.workflows import Int8Tensor

import fx_sparsity.kernels.packed_module
from fx_sparsity import lower
from fx_sparsity._native import KERNELS, compiler
from fx_sparsity.kernels import PACKINGS, PackingError, SparseLinear
from fx_sparsity.kernels.activations import ACTIVATIONS, quantize
from fx_sparsity.kernels.ops import linear_operator, plain_linear
from tests.kernels.levels import LEVELS

ROOT = Path(__file__).parents[2]
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
    terms = float(size) * float(module.dense_weight().double().abs().sum(1).max())
    if module.bias is not None:
        terms += float(module.bias.abs().max())
    atol = rtol * terms * 0.1
    torch.testing.assert_close(y.double(), want, rtol=rtol, atol=atol + 1e-12)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([*FLOATS, torch.int8]))
    quantizer = draw(st.sampled_from(["none", *QUANTIZED])) if dtype == torch.int8 else "none"
    module = layer(
        shape=(draw(st.integers(1, 70)), draw(st.integers(1, 150))),
        density=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        dtype=dtype,
        quantize_input=quantizer,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
    )
    x_dtype = draw(st.sampled_from(FLOATS)) if dtype == torch.int8 else dtype
    if draw(st.booleans()):
        module.bias = nn.Parameter(torch.randn(module.out_features).to(x_dtype))
    leading = draw(st.sampled_from([(), (0,), (1,), (2, 3), (5,), (17,), (2, 0), (64,)]))
    return module, torch.randn(*leading, module.in_features).to(x_dtype)


def operands(module, x):
    """What the layer calls its operator with."""
    bias = None if module.bias is None else module.bias.detach().to(x.dtype)
    options = (module.in_features, module.out_features, module.quantize_input, module.activation)
    return (x, *module.parts().values(), module.scale, module.row_sums, bias, *options)


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_against_float64(monkeypatch, level, case):
    assert KERNELS.ready(), KERNELS.state()
    monkeypatch.setenv("FX_SPARSITY_CPU", level)
    module, x = case
    with torch.no_grad():
        assert_close(module, x, module(x))
        assert_close(module, x, plain_linear(PACKINGS[module.packing], *operands(module, x)))


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([*FLOATS, torch.int8]),
    seed=st.integers(0, 9),
    turned=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_packs_as_plain_torch_does(shape, density, dtype, seed, turned):
    """Bit for bit, odd floats and other strides included."""
    assert KERNELS.ready(), KERNELS.state()
    weight = sparse(shape, density, dtype, seed)
    if dtype.is_floating_point:
        tiny = torch.finfo(dtype).smallest_normal / 4
        odd = torch.tensor([float("nan"), float("inf"), -0.0, tiny, -tiny], dtype=dtype)
        weight.view(-1)[: len(odd)] = odd[: weight.numel()]
    if turned:
        weight = weight.t().contiguous().t()
    packing = PACKINGS["bitmask"]
    parts, plain = packing.pack(weight), packing._pack_plainly(weight)
    assert parts.keys() == plain.keys()
    for name, part in parts.items():
        assert part.dtype == plain[name].dtype
        assert torch.equal(part.view(torch.uint8), plain[name].view(torch.uint8)), name


def test_unknown_level(monkeypatch):
    monkeypatch.setenv("FX_SPARSITY_CPU", "sse")
    with pytest.raises(RuntimeError, match="FX_SPARSITY_CPU is 'sse'"):
        layer()(torch.randn(1, 23))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@given(rows=st.integers(17, 300), seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_many_rows_of_any_strides(dtype, rows, seed):
    module = layer(shape=(50, 600), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, 2 * rows, generator=generator)
    x = x.to(torch.float32 if dtype == torch.int8 else dtype)
    for strided in (x.T[::2], x.T[:rows].expand(2, -1, -1), x.T[None, :rows, None]):
        with torch.no_grad():
            assert_close(module, strided, module(strided))
            assert torch.equal(module(strided), module(strided.contiguous()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("quantizer", "mapping"),
    [("token_symmetric", MappingType.SYMMETRIC), ("token_affine", MappingType.ASYMMETRIC)],
)
def test_quantizes_as_torchao(quantizer, mapping, dtype):
    x = torch.cat([torch.randn(50, 23), torch.randn(5, 23).abs(), torch.zeros(1, 23)]).to(dtype)
    theirs = Int8Tensor.from_hp(x, PerRow(), mapping)
    ours = quantize(x, quantizer)
    assert torch.equal(ours.codes, theirs.qdata.int())
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.zero_point, theirs.zero_point.int().view(-1, 1))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e3])
def test_multiplies_as_torch_ao(size):
    module = layer(shape=(48, 64), dtype=torch.int8, quantize_input="tensor_affine")
    scale, zero = module.scale.double(), torch.zeros(48, dtype=torch.long)
    weight = torch.quantize_per_channel(module.dense_weight(), scale, zero, 0, torch.qint8)
    assert torch.equal(weight.int_repr(), module.dense_codes())
    packed = torch.ops.quantized.linear_prepack(weight, None)
    for x in (torch.randn(7, 64) * size, torch.rand(7, 64) * size, -torch.rand(7, 64) * size):
        theirs = torch.ops.quantized.linear_dynamic(x, packed, True)
        with torch.no_grad():
            torch.testing.assert_close(module(x), theirs, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("quantizer", QUANTIZED)
def test_unusual_activations(quantizer):
    module = layer(dtype=torch.int8, quantize_input=quantizer)
    rows = {
        "zero": torch.zeros(23),
        "constant": torch.full((23,), 3.0),
        "huge": torch.randn(23) * 1e30,
        "tiny": torch.randn(23) * 1e-30,
        "positive": torch.rand(23) + 1,
        "negative": -torch.rand(23) - 1,
        "ties": torch.arange(23) / 2,
    }
    with torch.no_grad():
        for name, row in rows.items():
            for dtype in FLOATS:
                x = row.to(dtype).repeat(2, 1)
                plain = plain_linear(PACKINGS["bitmask"], *operands(module, x))
                assert torch.allclose(module(x), plain, rtol=1e-2, atol=1e-30), name
        x = torch.randn(2, 23)
        x[0, 5] = torch.nan
        assert module(x)[0].isnan().all()
        assert module(x)[1].isnan().all() == (quantizer == "tensor_affine")
        x[0, 5] = torch.inf
        assert not module(x)[0].isfinite().any()


@pytest.mark.parametrize("packing", ["bitmask", "block", "nm"])
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


@pytest.mark.parametrize("quantizer", ["none", *QUANTIZED])
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(quantizer, dtype):
    module = layer(dtype=dtype if quantizer == "none" else torch.int8, quantize_input=quantizer)
    x = torch.randn(3, 23, dtype=dtype, requires_grad=True)
    rest = (module.scale, module.row_sums, torch.randn(37, dtype=dtype), 23, 37, quantizer, "gelu")
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
        "needs a torch.int8 weight": {"weight": weight, "quantize_input": "token_affine"},
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


def test_new_memory_is_in_large_pages(monkeypatch):
    asked = set()

    def record(*tensors):
        asked.update(tensor.data_ptr() for tensor in tensors if tensor is not None)

    monkeypatch.setattr(fx_sparsity.kernels.packed_module, "use_large_pages", record)
    made = layer(density=0.9)
    loaded = layer(density=0.1)
    loaded.load_state_dict(made.state_dict())
    for module in (made, copy.deepcopy(made), loaded, layer().to(torch.bfloat16)):
        assert {part.data_ptr() for part in module.parts().values()} <= asked


def test_counts_bytes():
    module = layer(shape=(64, 64), density=0.5, dtype=torch.bfloat16)
    kept = int(module.dense_weight().count_nonzero())
    assert module.nbytes == 64 * 64 // 8 + 2 * kept + 64 + 8 * 5


@given(seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_flipped_bits_are_refused_or_harmless(seed):
    generator = torch.Generator().manual_seed(seed)
    module = layer(dtype=[*FLOATS, torch.int8][seed % 3], shape=(20, 30))
    parts = {name: part.clone() for name, part in module.parts().items()}
    name = sorted(parts)[seed // 3 % len(parts)]
    raw = parts[name].view(-1).view(torch.uint8)
    at = torch.randint(len(raw), (1 + seed % 2,), generator=generator)
    raw[at] ^= torch.randint(1, 256, at.shape, generator=generator).to(torch.uint8)
    try:
        PACKINGS[module.packing].check(parts, torch.Size((20, 30)), module.weight_dtype)
    except PackingError:
        return
    for name, part in parts.items():
        setattr(module, name, part)
    x = torch.ones(3, 30, dtype=torch.bfloat16 if seed % 3 else torch.float32)
    plain = plain_linear(PACKINGS[module.packing], *operands(module, x))
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain, rtol=0.1, atol=0.1, equal_nan=True)


@pytest.mark.parametrize("quantizer", ["none", "token_symmetric"])
def test_compiles_at_most_twice_for_all_batches(quantizer):
    module = layer(shape=(64, 48), dtype=torch.int8, quantize_input=quantizer, activation="silu")
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for tokens in (1, 4, 16, 64, 3):
            x = torch.randn(2, tokens, 48)
            assert torch.equal(compiled(x), module(x))
    assert counter.frame_count <= 2


def exported(module, dtype=torch.float32):
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    example = torch.randn(2, module.in_features).to(dtype)
    return torch.export.export(module, (example,), dynamic_shapes=({0: tokens},))


def test_exports_and_saves():
    module = layer(activation="gelu", bias=torch.randn(37))
    buffer = io.BytesIO()
    torch.export.save(exported(module), buffer)
    buffer.seek(0)
    program = torch.export.load(buffer).module()
    for tokens in (1, 16, 64):
        x = torch.randn(tokens, 23)
        assert torch.equal(program(x), module(x))


def test_packages(tmp_path):
    module = layer(dtype=torch.bfloat16)
    program = exported(module, torch.bfloat16)
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/layer.pt2")
    package = torch._inductor.aoti_load_package(path)
    for tokens in (1, 4, 64):
        x = torch.randn(tokens, 23).bfloat16()
        assert torch.equal(package(x), module(x))


def test_without_kernels(tmp_path):
    """A program saved here runs where no kernels can be had."""
    module = layer(dtype=torch.int8, quantize_input="token_affine")
    x = torch.randn(5, 23)
    torch.export.save(exported(module), tmp_path / "program.pt2")
    torch.save((x, module(x)), tmp_path / "pair.pt")
    script = (
        "import sys, torch, fx_sparsity.kernels.native as native\n"
        "import fx_sparsity.kernels\n"
        "x, y = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x), y)\n"
        "assert not native.KERNELS.ready()\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "program.pt2", tmp_path / "pair.pt"]
    subprocess.run(command, env={**os.environ, "FX_SPARSITY_KERNELS": "0"}, cwd=ROOT, check=True)


@pytest.mark.exhaustive
def test_under_the_address_sanitizer(tmp_path):
    """Every kernel at every level, at the edges of its memory, and with parts that are corrupt."""
    # Exceptions are thrown in the C++ library, which Python itself does not load.
    libraries = [
        subprocess.run(
            [compiler.find()[0], f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        "FX_SPARSITY_CACHE": str(tmp_path),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
    }
    command = [sys.executable, "-m", "tests.kernels.sanitized"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].startswith("clean")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quantizer", QUANTIZED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_of_activations_are_those_of_plain_torch(monkeypatch, level, quantizer, dtype):
    """An identity shows them."""
    monkeypatch.setenv("FX_SPARSITY_CPU", level)
    identity = torch.eye(64, dtype=torch.int8)
    module = SparseLinear.from_dense(
        identity, packing="bitmask", scale=torch.ones(64), quantize_input=quantizer
    )
    for seed in range(400):  # some have values in the very middle
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1 + seed % 40, 64, generator=generator).to(dtype)
        y = plain_linear(PACKINGS["bitmask"], *operands(module, x))
        assert torch.equal(module(x), y)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_activations(layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    model[0].weight.data[:, ::2] = 0
    x = torch.randn(5, 64).relu()
    expected = model(x)
    lowered, _ = lower(model, (x,), "bitmask")
    found = lowered(getattr(x, layout)())
    assert found.layout is torch.strided
    assert torch.allclose(found, expected, atol=1e-5)
