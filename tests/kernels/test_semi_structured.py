"""2:4 as the libraries on CUDA want it: the layout everywhere, the kernels where there is a GPU."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.kernels import (
    PACKINGS,
    LoweringError,
    PackingError,
    SparseLinear,
    check_packed,
    cuda,
    lower,
)
from fx_sparsity.kernels.activations import QUANTIZERS
from fx_sparsity.kernels.layers import DenseLinear
from fx_sparsity.kernels.ops import linear_operator
from fx_sparsity.kernels.packed_weights import read_packed
from fx_sparsity.kernels.policy import Policy
from tests.kernels.test_packings import by_groups

PACKING = PACKINGS["semi_structured"]
SIZES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (32, 128)}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def weight(dtype, rows=1, columns=1, seed=0):
    """Some groups keep fewer than two; zeros are negative where there are such."""
    height, width = SIZES[dtype]
    kind = torch.int8 if dtype == torch.int8 else torch.float32
    return by_groups((height * rows, width * columns), 2, 4, kind, seed).to(dtype)


def layer(dense, **options):
    """Made as it would be on CUDA, in CUTLASS's layout."""
    how = options.get("quantize_input", "none")
    return SparseLinear(
        PACKING.pack(dense),
        dense.shape,
        dense.dtype,
        options.get("bias"),
        packing=PACKING.name,
        scale=torch.rand(len(dense)) if dense.dtype == torch.int8 else None,
        row_sums=None if how == "none" else dense.sum(1, dtype=torch.int32),
        quantize_input=how,
        activation=options.get("activation", "none"),
    )


@given(st.sampled_from(list(SIZES)), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_weights_come_back_exactly(dtype, rows, columns, seed):
    dense = weight(dtype, rows, columns, seed)
    parts = PACKING.pack(dense)
    PACKING.check(parts, dense.shape, dtype)
    back = PACKING.unpack(parts, dense.shape, dtype)
    assert torch.equal(back, dense)
    assert not (back.float().signbit() & (back == 0)).any()
    assert sum(part.nbytes for part in parts.values()) <= dense.nbytes * 10 // 16


def test_positions_are_those_that_cutlass_documents():
    """Positions 0 and 1 are 0b0100, positions 2 and 3 are 0b1110, four groups a number."""
    dense = torch.zeros(32, 64, dtype=torch.bfloat16)
    dense.view(32, 16, 4)[..., 2:] = 1
    dense[0] = torch.tensor([1, 1, 0, 0], dtype=torch.bfloat16).repeat(16)
    meta = PACKING.pack(dense)["meta"].view(-1).to(torch.int32) & 0xFFFF
    assert meta[0] == 0x4444
    assert set(meta.tolist()) == {0x4444, 0xEEEE}
    assert int((meta == 0x4444).sum()) == 4


def test_corrupt_parts_are_refused():
    dense = weight(torch.bfloat16)
    parts = PACKING.pack(dense)
    meta = parts["meta"].clone()
    meta.zero_()  # both of each four at position 0
    for wrong, message in (
        ({"meta": meta}, "two values into one place"),
        ({"meta": parts["meta"][:, :1].contiguous()}, "meta has shape"),
        ({"values": parts["values"].half()}, "values is torch.float16"),
        ({"meta": meta.new_zeros(0)}, "values for cuSPARSELt are on cpu"),
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
    assert [arg.name for arg in there._schema.arguments][:3] == ["x", "values", "meta"]


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
    program.state_dict["0.meta"].zero_()
    with pytest.raises(PackingError, match="two values into one place"):
        check_packed(program)


def test_the_wish_for_nm_means_it_on_cuda(monkeypatch):
    class OnCuda(DenseLinear):
        device = torch.device("cuda")

    def choose(kind):
        how = {"tokens": (1,), "input_dtype": torch.bfloat16, "model_bytes": 0, "keep_dense": False}
        return Policy("nm").choose("w", kind(weight(torch.bfloat16)), "nm", **how).packing

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


@pytest.mark.parametrize("how", sorted(set(QUANTIZERS) - {"none"}))
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_integers_are_scaled_and_shifted_as_in_plain_torch(how, tokens, monkeypatch):
    """The CUDA kernel, with its one product done by the CPU."""
    shapes = []

    def product(values, meta, columns, out_dtype):
        shapes.append(tuple(columns.shape))
        dense = PACKING.unpack({"values": values, "meta": meta}, torch.Size((64, 256)), torch.int8)
        return (dense.double() @ columns.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", product)
    bias = torch.randn(64)
    module = layer(weight(torch.int8, 2, 2), quantize_input=how, bias=bias, activation="silu")
    x = torch.randn(1, tokens, 256)
    rest = (module.scale, module.row_sums, bias, 256, 64, how, "silu")
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
    assert {row.kernel for row in report.weights} == {"semi_structured"}
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
def test_auto_times_on_cuda():
    dense = model(torch.bfloat16)
    x = torch.randn(20, 256, dtype=torch.bfloat16, device="cuda")
    _, report = lower(dense, (x,))
    assert all(row.gain for row in report.weights)
