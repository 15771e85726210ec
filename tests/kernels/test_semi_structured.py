"""2:4 as the libraries on CUDA want it: the layout everywhere, the kernels where there is a GPU."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.kernels import PACKINGS, PackingError, SparseLinear, cuda
from fx_sparsity.kernels.activations import quantize
from fx_sparsity.kernels.ops import linear_operator
from fx_sparsity.kernels.semi_structured import _float8_refusal
from fx_sparsity.lowering import LoweringError, check_packed, lower
from fx_sparsity.lowering.layers import DenseLinear, read_torchao
from fx_sparsity.lowering.packed_weights import read_packed
from fx_sparsity.lowering.policy import Policy
from tests.kernels.test_packings import INTEGER_QUANTIZERS, by_groups

PACKING = PACKINGS["semi_structured"]
FLOAT8 = torch.float8_e4m3fn
SIZES = {
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.int8: (32, 128),
    FLOAT8: (32, 64),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def weight(dtype, rows=1, columns=1, seed=0):
    """Some groups keep fewer than two; zeros are negative where there are such."""
    height, width = SIZES[dtype]
    kind = torch.int8 if dtype == torch.int8 else torch.float32
    return by_groups((height * rows, width * columns), 2, 4, kind, seed).to(dtype)


def layer(dense, **options):
    """Made as it would be on CUDA, in CUTLASS's layout."""
    quantizer = options.get("quantize_input", "none")
    return SparseLinear(
        PACKING.pack(dense),
        dense.shape,
        dense.dtype,
        options.get("bias"),
        packing=PACKING.name,
        scale=torch.rand(len(dense)) if dense.dtype in (torch.int8, FLOAT8) else None,
        row_sums=dense.sum(1, dtype=torch.int32) if quantizer in INTEGER_QUANTIZERS else None,
        quantize_input=quantizer,
        activation=options.get("activation", "none"),
    )


@given(st.sampled_from(list(SIZES)), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_weights_come_back_exactly(dtype, rows, columns, seed):
    dense = weight(dtype, rows, columns, seed)
    parts = PACKING.pack(dense)
    PACKING.check(parts, dense.shape, dtype)
    back = PACKING.unpack(parts, dense.shape, dtype)
    assert back.dtype == dtype
    assert torch.equal(back.float(), dense.float())
    assert not (back.float().signbit() & (back == 0)).any()
    assert sum(part.nbytes for part in parts.values()) <= dense.nbytes * 10 // 16


def test_positions_are_those_that_cutlass_documents():
    """Positions 0 and 1 are 0b0100, positions 2 and 3 are 0b1110, four groups a number."""
    dense = torch.zeros(32, 64, dtype=torch.bfloat16)
    dense.view(32, 16, 4)[..., 2:] = 1
    dense[0] = torch.tensor([1, 1, 0, 0], dtype=torch.bfloat16).repeat(16)
    positions = PACKING.pack(dense)["positions"].view(-1).to(torch.int32) & 0xFFFF
    assert positions[0] == 0x4444
    assert set(positions.tolist()) == {0x4444, 0xEEEE}
    assert int((positions == 0x4444).sum()) == 4


def test_corrupt_parts_are_refused():
    dense = weight(torch.bfloat16)
    parts = PACKING.pack(dense)
    positions = parts["positions"].clone()
    positions.zero_()  # both of each four at position 0
    for wrong, message in (
        ({"positions": positions}, "two values into one place"),
        ({"positions": parts["positions"][:, :1].contiguous()}, "positions has shape"),
        ({"values": parts["values"].half()}, "values is torch.float16"),
        ({"positions": positions.new_zeros(0)}, "values for cuSPARSELt are on cpu"),
    ):
        with pytest.raises(PackingError, match=message):
            PACKING.check(parts | wrong, dense.shape, dense.dtype)


def test_elsewhere_than_on_cuda_it_is_refused_and_the_plain_path_computes():
    dense = weight(torch.bfloat16, 2, 3)
    assert "on CUDA alone, the weight is on cpu" in PACKING.refusal(dense)
    bias = torch.randn(64, dtype=torch.bfloat16)
    module = layer(dense, bias=bias, activation="relu")
    x = torch.randn(2, 5, 192).bfloat16()
    want = (x.float() @ dense.float().t() + bias.float()).relu()
    torch.testing.assert_close(module(x).float(), want, rtol=2**-7, atol=1e-3)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = layer(weight(torch.bfloat16, 2, 3, seed=1), bias=bias.clone(), activation="relu")
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), module(x))


def test_the_operator_has_the_name_that_2_4_has_on_the_cpu():
    here, there = (linear_operator(PACKINGS[name]) for name in ("nm", PACKING.name))
    assert here.overloadpacket is there.overloadpacket is torch.ops.fx_sparsity.nm_linear
    assert [arg.name for arg in here._schema.arguments][:3] == ["x", "mask", "values"]
    assert [arg.name for arg in there._schema.arguments][:3] == ["x", "values", "positions"]


def test_both_layouts_of_the_name_compute_and_are_read_in_one_program():
    """Of one weight: on the CPU the C++ kernel and plain torch, told apart by the overload."""
    dense = weight(torch.bfloat16, 2, 3)
    x = torch.randn(5, 192).bfloat16()
    both = nn.Sequential(layer(dense), SparseLinear.from_dense(dense[:, :64], packing="nm"))
    program = torch.export.export(both, (x,))
    want = nn.functional.linear(nn.functional.linear(x, dense), dense[:, :64])
    torch.testing.assert_close(program.module()(x), want, rtol=2**-6, atol=2**-4)
    schemes = {stored.scheme for stored in read_packed(program.module())}
    assert schemes == {"packed as semi_structured", "packed as nm"}
    check_packed(program)
    program.state_dict["0.positions"].zero_()
    with pytest.raises(PackingError, match="two values into one place"):
        check_packed(program)


def test_the_wish_for_nm_means_it_on_cuda(monkeypatch):
    class OnCuda(DenseLinear):
        device = torch.device("cuda")

    def choose(kind):
        calls = {
            "tokens": (1,),
            "input_dtype": torch.bfloat16,
            "model_bytes": 0,
            "keep_dense": False,
        }
        return Policy("nm").choose("w", kind(weight(torch.bfloat16)), "nm", **calls).packing

    assert choose(DenseLinear) == "nm"
    with pytest.raises(LoweringError, match="'semi_structured' cannot hold it: torch has"):
        choose(OnCuda)  # its weight is on the CPU after all
    monkeypatch.setattr(type(PACKING), "refusal", lambda self, weight: None)
    assert choose(OnCuda) == PACKING.name


def test_the_operator_is_known_to_the_compiler():
    module = layer(weight(torch.bfloat16))
    x = torch.randn(3, 64).bfloat16()
    args = (x, *module.parts().values(), None, None, None, 64, 32, "none", "none")
    torch.library.opcheck(linear_operator(PACKING), args)


@pytest.mark.parametrize("quantizer", INTEGER_QUANTIZERS)
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_integers_are_scaled_and_shifted_as_in_plain_torch(quantizer, tokens, monkeypatch):
    """The CUDA kernel, with its one product done by the CPU."""
    shapes = []

    def product(values, positions, columns, out_dtype):
        shapes.append(tuple(columns.shape))
        dense = PACKING.unpack(
            {"values": values, "positions": positions}, torch.Size((64, 256)), torch.int8
        )
        return (dense.double() @ columns.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", product)
    bias = torch.randn(64)
    module = layer(weight(torch.int8, 2, 2), quantize_input=quantizer, bias=bias, activation="silu")
    x = torch.randn(1, tokens, 256)
    rest = (module.scale, module.row_sums, bias, 256, 64, quantizer, "silu")
    found = cuda.semi_structured_linear(x, *module.parts().values(), *rest)
    torch.testing.assert_close(found, module(x))
    assert shapes == [(256, 16)]


def test_floats_go_through_torchs_tensor(monkeypatch):
    dense, seen = weight(torch.float16), []

    def product(x, tensor, bias):
        seen.append(type(tensor).__name__)
        return x @ tensor.to_dense().t() + bias

    monkeypatch.setattr(cuda, "linear", product)
    monkeypatch.setattr(cuda, "expect_input", lambda *_: None)
    x, bias = torch.randn(2, 3, 64).half(), torch.randn(32).half()
    parts = PACKING.pack(dense).values()
    found = cuda.semi_structured_linear(x, *parts, None, None, bias, 64, 32, "none", "relu")
    torch.testing.assert_close(found, (x @ dense.t() + bias).relu())
    assert seen == ["SparseSemiStructuredTensorCUTLASS"]


def float8_tensor(dense, **options):
    """As torchao's `quantize_` makes it with Float8DynamicActivationFloat8WeightConfig, on CUDA."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import (
        QuantizeTensorToFloat8Kwargs,
    )

    activations = QuantizeTensorToFloat8Kwargs(**{"granularity": PerRow()} | options)
    slow = Float8MMConfig(use_fast_accum=False)
    return Float8Tensor.from_hp(
        dense, granularity=PerRow(), mm_config=slow, act_quant_kwargs=activations
    )


def values_of(tensor):
    """What a tensor of torchao stands for, in float64."""
    return tensor.qdata.double() * tensor.scale.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 64)])
def test_float8_activations_are_those_of_torchao(dtype, shape):
    from torchao.quantization import Float8Tensor, PerRow

    x = torch.randn(shape).to(dtype) * torch.logspace(-6, 6, 64)
    want = Float8Tensor.from_hp(x.to(dtype), granularity=PerRow())
    codes, scale, zero_point = quantize(x.to(dtype), "token_float8")
    assert torch.equal(codes.view(torch.uint8), want.qdata.view(torch.uint8))
    assert torch.equal(scale, want.scale)
    assert not zero_point.any()


def test_float8_tokens_of_zeros_stay_zeros():
    codes, _, _ = quantize(torch.tensor([[0.0, -0.0], [1.0, -2.0]]), "token_float8")
    assert codes.float().tolist() == [[0, 0], [224, -448]]


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_float8_layers_compute_what_torchao_does(tokens, monkeypatch):
    """In plain torch, and in the CUDA kernel with its one product done by the CPU."""
    calls = []

    def product(values, columns, out_dtype):
        calls.append((values.dtype, columns.dtype, tuple(columns.shape), out_dtype))
        return (values.double() @ columns.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    tensor = float8_tensor(weight(torch.bfloat16, 2, 4))
    bias, x = torch.randn(64).bfloat16(), torch.randn(1, tokens, 256).bfloat16()
    dense = read_torchao(tensor)
    assert (dense.weight.dtype, dense.quantize_input) == (FLOAT8, "token_float8")
    module = layer(dense.weight, quantize_input="token_float8", bias=bias)
    module.scale = dense.scale
    # Its own product per row needs CUDA in torch 2.11.
    tokens_of, rows = float8_tensor(x), float8_tensor(weight(torch.bfloat16, 2, 4))
    want = values_of(tokens_of) @ values_of(rows).t() + bias
    torch.testing.assert_close(module(x).double(), want, rtol=2**-7, atol=2**-6)
    none = torch.empty(0, dtype=torch.int16)
    rest = (dense.scale, None, bias, 256, 64, "token_float8", "none")
    found = cuda.semi_structured_linear(x, dense.weight, none, *rest)
    torch.testing.assert_close(found, module(x))
    assert calls == [(FLOAT8, FLOAT8, (256, 16), torch.float32)]


def test_float8_is_multiplied_by_one_to_be_read_back(monkeypatch):
    def product(values, columns, out_dtype):
        assert not columns.is_contiguous()
        return (values.double() @ columns.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    dense = weight(FLOAT8)
    parts = {"values": dense, "positions": torch.empty(0, dtype=torch.int16)}
    back = PACKING.unpack(parts, dense.shape, FLOAT8)
    assert torch.equal(back.float(), dense.float())
    assert not (back.view(torch.uint8) == 0x80).any()


def test_both_zeros_of_float8_are_zero():
    dense = torch.ones(32, 64).to(FLOAT8)
    dense.view(torch.uint8).view(32, 16, 4)[:] = torch.tensor([0x80, 56, 0, 56], dtype=torch.uint8)
    back = PACKING.unpack(PACKING.pack(dense), dense.shape, FLOAT8)
    assert torch.equal(back.float(), dense.float())
    assert set(back.view(torch.uint8).flatten().tolist()) == {0, 56}


def test_float8_layers_keep_their_dtype_load_and_export():
    dense, other = weight(FLOAT8, 2, 3), weight(FLOAT8, 2, 3, seed=1)
    module, loaded = (layer(w, quantize_input="token_float8") for w in (dense, other))
    x = torch.randn(4, 192)
    want = module(x)
    assert module.bfloat16().values.dtype == FLOAT8
    assert module.scale.dtype == torch.float32
    assert torch.equal(module(x), want)
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(x), want)
    (stored,) = read_packed(nn.Sequential(module))
    assert stored.dtype == "float8_e4m3fn"
    assert torch.equal(stored.zeros(), dense == 0)
    assert torch.equal(stored.dequantize(), module.dense_weight())
    program = torch.export.export(module, (x,))
    check_packed(program)
    assert torch.equal(program.module()(x), want)


def test_float8_on_the_cpu_stays_dense_with_a_reason():
    made = nn.Sequential(nn.Linear(128, 64, dtype=torch.bfloat16))
    made[0].weight = nn.Parameter(float8_tensor(weight(torch.bfloat16, 2, 2)), requires_grad=False)
    lowered, report = lower(made, policy="always")  # which torch 2.11 cannot run here
    assert "torch has semi-structured kernels on CUDA alone" in report.dense["0.weight"]
    assert type(lowered[0].weight).__name__ == "Float8Tensor"


def test_float8_that_no_kernel_takes():
    dense = weight(torch.bfloat16, 2, 2)
    bounded = float8_tensor(dense, hp_value_ub=1.0)
    assert "hp_value_ub=1.0" in read_torchao(bounded)
    other = float8_tensor(dense, float8_dtype=torch.float8_e5m2)
    assert "float8_e5m2" in read_torchao(other)


def test_what_float8_needs_is_said(monkeypatch):
    here = torch.device("cpu")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "float8 needs cuSPARSELt" in _float8_refusal.__wrapped__(here)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert "torch refuses float8 on cpu: " in _float8_refusal.__wrapped__(here)
    for options, message in (
        ({"scale": None}, "needs a scale"),
        ({"scale": torch.ones(32)}, "needs quantize_input='token_float8', found 'none'"),
        ({"scale": torch.ones(32), "quantize_input": "token_affine"}, "needs a torch.int8 weight"),
    ):
        monkeypatch.setattr(type(PACKING), "refusal", lambda self, weight: None)
        with pytest.raises(ValueError, match=message):
            SparseLinear.from_dense(weight(FLOAT8), packing=PACKING.name, **options)


def model(dtype):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)).eval()
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(made, sparsifier, (torch.randn(3, 256),), fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    return fxs.squash(made, sparsifier)[0].to(dtype).cuda()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 100])
@pytest.mark.parametrize("policy", ["always", "nm"])
@torch.no_grad()
def test_lowered_on_cuda(dtype, tokens, policy):
    dense = model(dtype)
    x = torch.randn(tokens, 256, dtype=dtype, device="cuda")
    lowered, report = lower(copy.deepcopy(dense), (x,), policy)
    assert {row.kernel for row in report.rows} == {"semi_structured"}
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(lowered(x), dense(x), rtol=8 * eps, atol=8 * eps)
    compiled = torch.compile(lowered, fullgraph=True)
    torch.testing.assert_close(compiled(x), dense(x), rtol=8 * eps, atol=8 * eps)
    assert torch.equal(fxs.unlower(lowered)(x), dense(x))


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_int8_on_cuda():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    dense = model(torch.bfloat16)
    quantize_(dense, Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(20, 256, dtype=torch.bfloat16, device="cuda")
    lowered, report = lower(copy.deepcopy(dense), (x,), "always")
    assert set(report.lowered) == {"0.weight", "2.weight"}
    torch.testing.assert_close(lowered(x), dense(x), rtol=0.05, atol=0.05)


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_float8_on_cuda():
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    dense = model(torch.bfloat16)
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("torchao has no float8 for this GPU")
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    quantize_(dense, config)
    x = torch.randn(20, 256, dtype=torch.bfloat16, device="cuda")
    reason = _float8_refusal(x.device)
    lowered, report = lower(copy.deepcopy(dense), (x,), "always")
    if reason is not None:
        assert all(reason in found for found in report.dense.values())
        return
    assert set(report.lowered) == {"0.weight", "2.weight"}
    torch.testing.assert_close(lowered(x), dense(x), rtol=0.05, atol=0.05)
    compiled = torch.compile(lowered, fullgraph=True)
    torch.testing.assert_close(compiled(x), lowered(x))
    back = fxs.unlower(lowered)
    for name in (0, 2):
        want = dense[name].weight.qdata.float()
        assert torch.equal(back[name].weight.qdata.float(), want)


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_auto_times_on_cuda():
    dense = model(torch.bfloat16)
    x = torch.randn(20, 256, dtype=torch.bfloat16, device="cuda")
    _, report = lower(dense, (x,))
    assert all(row.gain for row in report.rows)
