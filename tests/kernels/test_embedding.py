"""Row-pruned tables against torch's embeddings over the same table with all its rows."""

import copy
import io
import itertools
import mmap
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.ao.nn.quantized as nnq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import (
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
)
from torch.nn import functional as F

from fx_sparsity._native import KERNELS
from fx_sparsity.kernels import (
    PackingError,
    RowPrunedEmbedding,
    RowPrunedEmbeddingBag,
    RowTable,
    pages,
)
from fx_sparsity.kernels import embedding_ops as operators
from fx_sparsity.quantization.codes import Codes, hold_codes
from tests.kernels.levels import LEVELS

FLOATS = (torch.float32, torch.bfloat16)
STORED = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 8), (torch.bfloat16, 4)]
INDICES = (torch.int32, torch.int64)


@pytest.fixture(autouse=True, scope="module")
def native():
    assert KERNELS.ready(), KERNELS.state()


def table(rows=20, columns=5, density=0.5, dtype=torch.float32, seed=0, whole=False):
    """A weight of which about `density` of the rows are kept, values of half of the others -0.0.

    Whole numbers have exact sums.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if whole:
        weight = torch.randint(-8, 9, weight.shape, generator=generator).float()
    return (weight * (torch.rand(rows, 1, generator=generator) < density)).to(dtype)


def expected_bag(module, weight, indices, offsets, weights):
    """What torch's own bag makes of the dense table, in float64."""
    if indices.numel() == 0 and offsets is None:  # which torch's own refuses
        return torch.zeros(len(indices), weight.shape[1], dtype=torch.float64)
    return F.embedding_bag(
        indices.long(),
        weight.double(),
        None if offsets is None else offsets.long(),
        mode=module.mode,
        per_sample_weights=None if weights is None else weights.double(),
        padding_idx=module.padding_idx,
        include_last_offset=module.include_last_offset,
    )


def plain(module, *arguments):
    """The same call in plain torch, whatever library is loaded."""
    bag = isinstance(module, RowPrunedEmbeddingBag)
    name = f"row_pruned_embedding{'_bag' if bag else ''}"
    run = operators.look_up_bags if bag else operators.look_up
    with pytest.MonkeyPatch.context() as context:
        context.setattr(operators, "cpu_kernel", lambda *_: None)
        context.setattr(torch.ops.fx_sparsity, name, SimpleNamespace(default=run))
        return module(*arguments)


@st.composite
def bags(draw):
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    dtype, bits = draw(st.sampled_from(STORED))
    mode = draw(st.sampled_from(operators.MODES))
    density = draw(st.sampled_from([0.0, 0.5, 1.0]))
    weight = table(rows, columns, density, dtype, draw(st.integers(0, 99)), bits is None)
    module = RowPrunedEmbeddingBag.from_dense(
        weight,
        bits=bits,
        mode=mode,
        padding_idx=draw(st.none() | st.integers(0, rows - 1)),
        include_last_offset=draw(st.booleans()),
    )
    sizes = draw(st.lists(st.integers(0, 30), max_size=8))
    flat = draw(st.booleans())
    shape = (sum(sizes),) if flat else (len(sizes), draw(st.integers(0, 30)))
    indices = torch.randint(0, rows, shape).to(draw(st.sampled_from(INDICES)))
    offsets = None
    if flat:
        bounds = list(itertools.accumulate(sizes, initial=0))
        offsets = torch.tensor(bounds if module.include_last_offset else bounds[:-1])
        offsets = offsets.to(draw(st.sampled_from(INDICES)))
    weights = torch.randint(-4, 5, shape).float() if mode == "sum" and draw(st.booleans()) else None
    return module, weight, indices, offsets, weights


at_every_level = pytest.mark.parametrize("level", LEVELS)


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@at_every_level
@given(case=bags())
@examples(60)
def test_bags(monkeypatch, level, case):
    monkeypatch.setenv("FX_SPARSITY_CPU", level)
    module, weight, indices, offsets, weights = case
    result = module(indices, offsets, weights)
    assert result.dtype == weight.dtype
    coded = module.affine is not None
    # Codes mean floats, of which `dense_weight` shows fewer bits where results are bfloat16.
    rows = torch.arange(module.num_embeddings)
    dense = module.table.look_up(rows, torch.float32) if coded else weight
    want = expected_bag(module, dense, indices, offsets, weights)
    if coded or module.mode == "mean":
        exact = weight.dtype == torch.float32
        rtol, atol = (1e-5, 1e-4) if exact else (2**-7, 2**-5)
        torch.testing.assert_close(result.double(), want, rtol=rtol, atol=atol)
    else:
        assert torch.equal(result.double(), want.to(weight.dtype).double())
    rtol = 1e-5 if weight.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(
        plain(module, indices, offsets, weights), result, rtol=rtol, atol=10 * rtol
    )


@at_every_level
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    stored=st.sampled_from(STORED),
    shape=st.sampled_from([(), (0,), (1,), (3, 4), (2, 0, 3)]),
    dtype=st.sampled_from(INDICES),
)
@examples(40)
def test_rows(monkeypatch, level, rows, columns, density, stored, shape, dtype):
    monkeypatch.setenv("FX_SPARSITY_CPU", level)
    weight = table(rows, columns, density, stored[0], rows)
    module = RowPrunedEmbedding.from_dense(weight, bits=stored[1])
    indices = torch.randint(0, rows, shape, dtype=dtype)
    result = module(indices)
    assert result.dtype == weight.dtype
    dense = module.dense_weight()
    assert not (dense.signbit() & (dense == 0)).any()
    if stored[1] is None:
        assert torch.equal(dense, weight)
        assert torch.equal(result, weight[indices.long()])
    else:
        spread = weight.float().amax(1) - weight.float().amin(1)
        step = (spread / (2 ** stored[1] - 1)).unsqueeze(1)
        rounding = 2**-7 if stored[0] == torch.bfloat16 else 1e-6
        error = (dense.double() - weight.double()).abs()
        assert (error <= 0.51 * step + rounding * weight.abs() + 1e-6).all()
    torch.testing.assert_close(result, F.embedding(indices.long(), dense), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(plain(module, indices), result, rtol=1e-6, atol=1e-6)


def test_keeps_bits_of_floats():
    weight = torch.tensor([[0.0, -0.0], [-0.0, torch.nan], [torch.inf, 1e-45]])
    module = RowPrunedEmbedding.from_dense(weight)
    assert module.remap.tolist() == [-1, 0, 1]
    found = module(torch.tensor([1, 2, 0]))
    assert torch.equal(found.view(torch.int32)[:2], weight[1:].view(torch.int32))
    assert torch.equal(found[2].view(torch.int32), torch.zeros(2, dtype=torch.int32))
    bag = RowPrunedEmbeddingBag.from_dense(weight, mode="max")
    indices = torch.tensor([[1, 2], [2, 1], [0, 1], [1, 0], [0, 0]])
    want = F.embedding_bag(indices, weight, mode="max")
    assert torch.equal(bag(indices).nan_to_num(7), want.nan_to_num(7))


def test_pruned_rows_stay_zero_under_any_weight():
    module = RowPrunedEmbeddingBag.from_dense(torch.tensor([[0.0], [2.0]]), mode="sum")
    weights = torch.tensor([[torch.inf, 1.0], [torch.nan, -1.0]])
    indices = torch.tensor([[0, 1], [0, 1]])
    assert module(indices, None, weights).tolist() == [[2.0], [-2.0]]
    assert plain(module, indices, None, weights).tolist() == [[2.0], [-2.0]]


def test_of_modules():
    weight = table(columns=6)
    indices = torch.randint(0, 20, (4, 3))
    embedding = nn.Embedding(20, 6, padding_idx=2, max_norm=1.0, _weight=weight.clone())
    found = RowPrunedEmbedding.from_dense(embedding)
    assert torch.equal(embedding.weight, weight)  # which its own forward would rescale
    torch.testing.assert_close(found(indices), embedding(indices))
    assert found.padding_idx == 2
    options = {"mode": "max", "padding_idx": -3, "include_last_offset": True}
    bag = nn.EmbeddingBag(20, 6, _weight=weight, **options)
    found = RowPrunedEmbeddingBag.from_dense(bag)
    assert torch.equal(found(indices), bag(indices))
    assert (found.mode, found.padding_idx, found.include_last_offset) == ("max", 17, True)


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize(
    "qconfig", [float_qparams_weight_only_qconfig, float_qparams_weight_only_qconfig_4bit]
)
def test_of_torchs_quantized_modules(qconfig):
    indices = torch.randint(0, 20, (4, 3))
    for kind, quantized_kind, ours in (
        (nn.Embedding, nnq.Embedding, RowPrunedEmbedding),
        (nn.EmbeddingBag, nnq.EmbeddingBag, RowPrunedEmbeddingBag),
    ):
        source = kind(20, 6, _weight=table(columns=6))
        if kind is nn.EmbeddingBag:
            source.mode = "sum"
        source.qconfig = qconfig
        quantized = quantized_kind.from_float(source)
        quantized.dtype = quantized._packed_params.dtype = quantized.weight().dtype
        found = ours.from_dense(quantized)
        assert len(found.rows) == int((table(columns=6) != 0).any(1).sum())
        offsets = [torch.arange(0, 12, 3)] if kind is nn.EmbeddingBag else []
        flat = indices.flatten() if offsets else indices
        # Torch rounds 4-bit scales to fp16.
        torch.testing.assert_close(
            found(flat, *offsets), quantized(flat, *offsets), rtol=2e-3, atol=4e-3
        )


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_of_modules_that_hold_codes():
    weight = table(columns=6)
    scale = torch.rand(20, dtype=torch.double) + 0.1
    zero_point = torch.randint(100, 150, (20,)).double()
    quantized = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.quint8)
    indices = torch.randint(0, 20, (4, 3))
    for source, ours in (
        (nn.Embedding(20, 6, padding_idx=2), RowPrunedEmbedding),
        (nn.EmbeddingBag(20, 6, mode="max", padding_idx=2), RowPrunedEmbeddingBag),
    ):
        for dtype in FLOATS:
            module = copy.deepcopy(source).to(dtype)
            hold_codes(module, Codes(quantized, like=module.weight))
            found = ours.from_dense(module)
            assert found.rows.dtype == torch.int8
            assert len(found.rows) == int((quantized.dequantize() != 0).any(1).sum())
            assert found.padding_idx == 2
            assert torch.equal(found.dense_weight(), module.weight)
            assert found(indices).dtype == dtype
            torch.testing.assert_close(found(indices), module(indices))
            with pytest.raises(ValueError, match="found one of 8-bit codes"):
                ours.from_dense(module, bits=4)


def test_codes():
    for dtype, bits, zero in (
        (torch.uint8, 8, 130),
        (torch.int8, 8, 0),
        (torch.uint8, 4, 7),
        (torch.int8, 4, 0),
    ):
        least = 0 if dtype == torch.uint8 else -(2 ** (bits - 1))
        codes = torch.randint(least, least + 2**bits, (20, 5), dtype=dtype)
        codes[::2] = zero
        scale = torch.rand(20) + 0.1
        zeros = torch.full((20, 1), zero)
        module = RowPrunedEmbedding.from_codes(codes, scale, zeros, bits=bits)
        assert len(module.rows) == 10
        want = (codes.float() - zero) * scale.unsqueeze(1)
        assert torch.equal(module.dense_weight(), want + 0.0)
        torch.testing.assert_close(module(torch.arange(20)), want, rtol=1e-6, atol=0)
    half = RowPrunedEmbedding.from_codes(codes, scale, zeros, bits=4, dtype=torch.bfloat16)
    assert half(torch.arange(20)).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [20, -1, 2**31 - 1, -(2**31), 2**40])
def test_out_of_range(value):
    rows = RowPrunedEmbedding.from_dense(table())
    bag = RowPrunedEmbeddingBag.from_dense(table())
    indices = torch.zeros(40, 1000, dtype=torch.int64)
    indices[30, 700] = indices[31, 2] = value
    message = f"index {value} at position 30700 is out of range for a table of 20 rows"
    for module in (rows, bag):
        with pytest.raises(IndexError, match=message):
            module(indices)
        with pytest.raises(IndexError, match=message):
            plain(module, indices)
    with pytest.raises(RuntimeError, match=message):
        torch.compile(bag, fullgraph=True)(indices)
    if abs(value) < 2**31 + 1:
        with pytest.raises(IndexError, match=message):
            rows(indices.int())
    # What no bag holds is not read.
    bag.include_last_offset = True
    tail = torch.tensor([3, value])
    assert torch.equal(bag(tail, torch.tensor([0, 1])), table()[3:4])
    assert torch.equal(plain(bag, tail, torch.tensor([0, 1])), table()[3:4])


def test_empty_table():
    module = RowPrunedEmbedding.from_dense(torch.zeros(0, 3))
    assert module(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 3)
    with pytest.raises(IndexError, match="index 0 at position 0 .* a table of 0 rows"):
        module(torch.tensor([0]))


def test_refuses_calls():
    bag = RowPrunedEmbeddingBag.from_dense(table(), mode="mean")
    one, two = torch.zeros(4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    offsets = torch.tensor([0, 2])
    for error, message, arguments in (
        (TypeError, "indices of int32 or int64, found torch.float32", (two.float(),)),
        (TypeError, "offsets of int32 or int64", (one, offsets.short())),
        (ValueError, r"found \[4\] without offsets", (one,)),
        (ValueError, r"found \[2, 2\] with offsets", (two, offsets)),
        (ValueError, "indices are on meta", (two.to("meta"),)),
        (ValueError, "begin with 0", (one, torch.tensor([1, 2]))),
        (ValueError, "never decrease", (one, torch.tensor([0, 3, 2]))),
        (ValueError, "end within 4", (one, torch.tensor([0, 5]))),
        (NotImplementedError, "mode 'mean'", (one, offsets, torch.ones(4))),
    ):
        with pytest.raises(error, match=message):
            bag(*arguments)
    bag.mode = "sum"
    with pytest.raises(ValueError, match=r"per_sample_weights of \[4\], found \[3\]"):
        bag(one, offsets, torch.ones(3))


def test_refuses_sources():
    weight, codes = table(), torch.zeros(3, 4, dtype=torch.uint8)
    one = torch.ones(3)
    for error, message, work in (
        (TypeError, "found torch.float16", lambda: RowTable.from_weight(weight.half())),
        (ValueError, r"found \[20\]", lambda: RowTable.from_weight(weight[:, 0])),
        (ValueError, "found 3", lambda: RowTable.from_weight(weight, 3)),
        (
            ValueError,
            "in row 1",
            lambda: RowTable.from_weight(torch.tensor([[0.0], [torch.nan]]), 8),
        ),
        (TypeError, "found torch.int16", lambda: RowTable.from_codes(codes.short(), one, one)),
        (ValueError, "each of 3 rows", lambda: RowTable.from_codes(codes, one[:2], one)),
        (ValueError, "in row 0", lambda: RowTable.from_codes(codes, one / 0, one)),
        (ValueError, "4 bits", lambda: RowTable.from_codes(codes + 16, one, one, 4)),
        (ValueError, "found 'min'", lambda: RowPrunedEmbeddingBag.from_dense(weight, mode="min")),
        (
            ValueError,
            "0 to 19, found 20",
            lambda: RowPrunedEmbeddingBag.from_dense(weight, padding_idx=20),
        ),
    ):
        with pytest.raises(error, match=message):
            work()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_corrupt_parts_are_refused(bits):
    module = RowPrunedEmbedding.from_dense(table(), bits=bits)
    good = module.state_dict()
    kept = len(module.rows)
    cases = {
        "remap sends index 0 to row -2": {"remap": good["remap"] * 0 - 2},
        f"remap sends index 19 to row {kept}": {
            "remap": torch.cat([good["remap"][:-1], torch.tensor([kept], dtype=torch.int32)])
        },
        "remap is torch.int64": {"remap": good["remap"].long()},
        "rows have shape": {"rows": good["rows"][:, :-1]},
        "rows are torch.float64": {"rows": good["rows"].double()},
        "a table of 21 rows": {"remap": torch.cat([good["remap"], good["remap"][:1]])},
    }
    if bits:
        cases["affine is torch.float32"] = {"affine": good["affine"][1:]}
        cases["affine holds"] = {"affine": good["affine"] / 0}
    for message, part in cases.items():
        with pytest.raises(RuntimeError, match=f"RowPrunedEmbedding: {message}"):
            module.load_state_dict({**good, **part})
        assert torch.equal(module.remap, good["remap"])
    with pytest.raises(PackingError, match="remap sends"):
        RowTable(module.rows, module.affine, good["remap"] + 5, 5).check()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_the_remap_says_nothing_else_is_read(data):
    """Parts that never were checked: rows out of range read as pruned."""
    module = RowPrunedEmbeddingBag.from_dense(table(), mode="sum", bits=8)
    values = st.integers(-(2**31), 2**31 - 1)
    module.remap = torch.tensor(
        data.draw(st.lists(values, min_size=20, max_size=20)), dtype=torch.int32
    )
    found = module(torch.arange(20).unsqueeze(1))
    inside = (module.remap >= 0) & (module.remap < len(module.rows))
    assert not found[~inside].any()


def test_state_dict_brings_other_rows():
    for bits in (None, 8, 4):
        source = RowPrunedEmbedding.from_dense(table(density=0.9), bits=bits)
        target = RowPrunedEmbedding.from_dense(table(density=0.1), bits=bits)
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer))
        assert torch.equal(target.dense_weight(), source.dense_weight())


def test_converts():
    module = RowPrunedEmbedding.from_dense(table())
    assert torch.equal(module.bfloat16()(torch.arange(20)), table().bfloat16())
    with pytest.raises(TypeError, match="found torch.float16"):
        module.half()
    coded = RowPrunedEmbedding.from_dense(table(), bits=8)
    dense = coded.dense_weight()
    assert coded.bfloat16().affine.dtype == torch.float32
    assert torch.equal(coded(torch.arange(20)), dense.bfloat16())


def test_counts_bytes():
    weight = table(1000, 64)
    kept = int((weight != 0).any(1).sum())
    for bits, row in ((None, 256), (8, 72), (4, 40)):
        assert RowPrunedEmbedding.from_dense(weight, bits=bits).nbytes == 4000 + row * kept


def test_large_tables_are_put_into_large_pages(monkeypatch):
    advised, advise = [], pages._advise
    monkeypatch.setattr(pages, "_advise", lambda *area: advised.append(area) or advise(*area))
    RowPrunedEmbedding.from_dense(table())
    assert not advised

    def is_settled(module, weight):
        ((start, size),) = advised
        advised.clear()
        first, last = module.rows.data_ptr(), module.rows.data_ptr() + module.rows.nbytes
        page = mmap.PAGESIZE
        within = first <= start < first + page and last - page < start + size <= last
        return within and torch.equal(module.dense_weight(), weight)

    weight, other = table(60_000, 64), table(60_000, 64, seed=1)
    module = RowPrunedEmbedding.from_dense(weight)
    assert is_settled(module, weight)
    assert is_settled(copy.deepcopy(module), weight)
    assert is_settled(pickle.loads(pickle.dumps(module)), weight)
    assert is_settled(module.bfloat16(), weight.bfloat16())
    source = RowPrunedEmbedding.from_dense(other.bfloat16())
    assert is_settled(source, other.bfloat16())
    module.load_state_dict(source.state_dict())
    assert is_settled(module, other.bfloat16())


@pytest.mark.parametrize("path", ["native", "plain"])
def test_gradient_of_weights(path):
    weight = table()
    module = RowPrunedEmbeddingBag.from_dense(weight, mode="sum", padding_idx=3)
    indices = torch.randint(0, 20, (12,))
    indices[:2] = 3
    offsets = torch.tensor([0, 5, 5, 9])
    weights = torch.randn(12, requires_grad=True)
    grad = torch.randn(4, 5)
    call = module if path == "native" else lambda *x: plain(module, *x)
    if path == "native":
        call(indices, offsets, weights).backward(grad)
        exact = weights.detach().double().requires_grad_()
        want = F.embedding_bag(
            indices, weight.double(), offsets, mode="sum", per_sample_weights=exact, padding_idx=3
        )
        want.backward(grad.double())
        torch.testing.assert_close(weights.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
        weights.grad = None
        square = indices.view(3, 4)
        module(square, None, weights.view(3, 4).bfloat16()).sum().backward()
        assert weights.grad.abs().sum() > 0
    else:
        torch.testing.assert_close(
            call(indices, offsets, weights), module(indices, offsets, weights)
        )


@pytest.mark.parametrize("bits", [None, 8])
def test_opcheck(bits):
    module = RowPrunedEmbeddingBag.from_dense(table(), mode="sum", bits=bits)
    parts = (module.rows, module.affine, module.remap, 5, "float32")
    indices, offsets = torch.randint(0, 20, (12,)), torch.tensor([0, 3, 12])
    ops = torch.ops.fx_sparsity
    torch.library.opcheck(ops.row_pruned_embedding.default, (indices.view(3, 4), *parts))
    for weights in (None, torch.randn(12, requires_grad=True)):
        torch.library.opcheck(
            ops.row_pruned_embedding_bag.default,
            (indices, offsets, weights, *parts, 0, -1, True),
        )


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = RowPrunedEmbedding.from_dense(table(), bits=4)
        self.bag = RowPrunedEmbeddingBag.from_dense(table(), bits=8, mode="mean")

    def forward(self, indices):
        return self.rows(indices).mean(1) + self.bag(indices)


def test_compiles_once_or_twice():
    model = Both()
    count = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for size in (1, 4, 16, 64):
        indices = torch.randint(0, 20, (size, 3))
        torch.testing.assert_close(compiled(indices), model(indices))
    assert count.frame_count <= 2


@pytest.mark.exhaustive  # packages of lowered models are in tests/verification/test_pt2_file.py
def test_exports(tmp_path):
    model = Both()
    indices = torch.randint(0, 20, (4, 3))
    size = torch.export.Dim("size", min=1)
    program = torch.export.export(model, (indices,), dynamic_shapes=({0: size},))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "package.pt2")
    )
    ahead = torch._inductor.aoti_load_package(package)
    for size in (1, 9):
        indices = torch.randint(0, 20, (size, 3))
        torch.testing.assert_close(loaded(indices), model(indices))
        torch.testing.assert_close(ahead(indices), model(indices))
    with pytest.raises(RuntimeError):
        ahead(indices + 20)
