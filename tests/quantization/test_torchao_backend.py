import copy
import io
import sys
from functools import cache

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F
from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.qat.linear import FakeQuantizedLinear

import fx_sparsity as fxs
from fx_sparsity.quantization import (
    BackendError,
    get_backend,
    sparsify_and_quantize,
    sparsify_codes,
)
from fx_sparsity.quantization.torchao_backend import TorchAOBackend
from fx_sparsity.quantization.torchao_codes import read_tensor
from fx_sparsity.quantization.torchao_tensors import is_torchao
from fx_sparsity.verification import ZeroNotRepresentableError, read_weights, verify
from tests.models import Root, make
from tests.sparsifier.test_base import assert_unchanged, snapshot

INT8 = Int8WeightOnlyConfig(set_inductor_config=False)
FLOAT8 = Float8WeightOnlyConfig(set_inductor_config=False)
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(4))
ASYMMETRIC = IntxWeightOnlyConfig(
    weight_dtype=torch.int4, granularity=PerGroup(4), mapping_type=MappingType.ASYMMETRIC
)
DYNAMIC_INT4 = Int8DynamicActivationIntxWeightConfig(
    weight_dtype=torch.int4, weight_granularity=PerGroup(4)
)
ROWS = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
CONFIGS = {
    "default": None,
    "int8": {nn.Linear: INT8, nn.Embedding: INT8},
    "int4": {nn.Linear: INT4, nn.Embedding: INT4},
    "int4 asymmetric": {nn.Linear: ASYMMETRIC, nn.Embedding: ASYMMETRIC},
    "dynamic int4": {nn.Linear: DYNAMIC_INT4, nn.Embedding: ROWS},
    "float8": {nn.Linear: FLOAT8, nn.Embedding: FLOAT8},
}
PACKED_INT4 = {"bottom.2": Int4WeightOnlyConfig(group_size=4, set_inductor_config=False)}
ODD_GROUPS = IntxWeightOnlyConfig(granularity=PerGroup(5))
LARGE_GROUPS = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)
PATTERNS = ("unstructured 50%", "2:4", "block:2x4 50%", "rows 50%")


def flow(model, inputs, order, pattern="2:4", **kwargs):
    mapping = pattern
    if isinstance(pattern, str):
        mapping = fxs.SparsityMapping().set_global(pattern)
    return sparsify_and_quantize(
        model,
        fxs.WeightNormSparsifier(),
        inputs,
        order=order,
        backend="torchao",
        mapping=mapping,
        **kwargs,
    )


def quantize(model, inputs, config=None):
    weights = fxs.find_weights(model, inputs)
    return get_backend("torchao").quantize(model, inputs, weights, config=config)


@cache
def reference(config, dtype):
    """The tied model, quantized without masks."""
    model, inputs = make("tied")
    return quantize(model.to(dtype), inputs, CONFIGS[config])


def train(model, inputs, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first"])
def test_zeros_survive_in_both_orders(order, config, dtype):
    model, inputs = make("tied")
    model.to(dtype)
    before = snapshot(model)
    for pattern in PATTERNS:
        alone = reference(config, dtype)
        quantized, verification = flow(
            model, inputs, order, pattern, config=CONFIGS[config], reference=alone
        )
        verification.raise_if_lost()
        assert [row.where for row in verification] == [
            "embed.weight",
            "head.weight",
            "block.weight",
        ]
        for row in verification:
            assert row.quantized
            assert row.meant
            assert row.zero_dequantized == row.wanted == row.elements // 2
            assert row.extra == 0
            # Independent of the reader: what torchao itself makes of its codes.
            values = quantized.get_parameter(row.where).dequantize()
            assert row.zeros == values.eq(0).sum() >= row.wanted
        assert torch.isfinite(quantized(*inputs)).all()
        assert_unchanged(model, before)


TENSORS = {
    "int8": (INT8, (8, 16)),
    "int8, one scale": (
        Int8WeightOnlyConfig(set_inductor_config=False, granularity=PerTensor()),
        (8, 16),
    ),
    "int8, groups": (
        Int8WeightOnlyConfig(set_inductor_config=False, granularity=PerGroup(4)),
        (8, 16),
    ),
    "int8, columns": (
        Int8WeightOnlyConfig(set_inductor_config=False, granularity=PerRow(dim=0)),
        (8, 16),
    ),
    "int8, reduced": (
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=True),
        (8, 16),
    ),
    "int8, experts": (INT8, (2, 8, 16)),
    "int3": (IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(4)), (8, 16)),
    "int4 asymmetric": (ASYMMETRIC, (8, 16)),
    "int4 asymmetric, convolution": (ASYMMETRIC, (8, 16, 3, 3)),
    "int8 asymmetric": (
        IntxWeightOnlyConfig(
            weight_dtype=torch.int8, granularity=PerAxis(0), mapping_type=MappingType.ASYMMETRIC
        ),
        (8, 16),
    ),
    "float8": (FLOAT8, (8, 16)),
    "float8, one scale": (
        Float8WeightOnlyConfig(set_inductor_config=False, granularity=PerTensor()),
        (8, 16),
    ),
    "float8, groups": (
        Float8WeightOnlyConfig(set_inductor_config=False, granularity=PerGroup(4)),
        (8, 16),
    ),
    "float8, e5m2": (
        Float8WeightOnlyConfig(set_inductor_config=False, weight_dtype=torch.float8_e5m2),
        (8, 16),
    ),
}


def stored(name, dtype=torch.float32):
    """(what torchao makes of a random weight that is not centred, how it is read)."""
    torch.manual_seed(0)
    config, shape = TENSORS[name]
    owner = nn.Module()
    owner.bias = None
    owner.weight = nn.Parameter((torch.randn(shape) + 0.3).to(dtype))
    quantize_(owner, FqnToConfig({"weight": config}), filter_fn=None)
    return owner.weight, read_tensor("weight", owner.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_codes_stand_for_what_torchao_dequantizes(name, dtype):
    tensor, weight = stored(name, dtype)
    assert torch.equal(weight.dequantize().to(dtype), tensor.dequantize())
    assert torch.equal(weight.zeros(), tensor.dequantize() == 0)
    if weight.code_range is not None:
        low, high = weight.code_range
        assert low <= weight.data.min() < weight.data.max() <= high
    scale, codes = tensor.scale.clone(), weight.data.clone()
    keep = torch.rand(tensor.shape) < 0.5
    before = tensor.dequantize()
    weight.set_zero(keep)
    assert torch.equal(tensor.scale, scale)
    assert torch.equal(tensor.dequantize(), torch.where(keep, before, 0))
    again = read_tensor("weight", tensor)
    assert torch.equal(again.data[keep], codes[keep])
    assert torch.equal(weight.data, codes), "what was read changes with what is stored"


def test_schemes():
    lines = []
    for name in TENSORS:
        _, weight = stored(name)
        lines.append(f"{name}: {weight.dtype} {weight.code_range} {weight.scheme}")
    assert_expected_inline(
        "\n".join(lines),
        """\
int8: int8 (-128, 127) per-channel symmetric, axis 0
int8, one scale: int8 (-128, 127) per-tensor symmetric
int8, groups: int8 (-128, 127) per-group symmetric, 1x4
int8, columns: int8 (-128, 127) per-channel symmetric, axis 1
int8, reduced: int8 (-64, 63) per-channel symmetric, axis 0
int8, experts: int8 (-128, 127) per-group symmetric, 1x1x16
int3: int3 (-4, 3) per-group symmetric, 1x4
int4 asymmetric: int4 (-8, 7) per-group affine (integer zero point), 1x4
int4 asymmetric, convolution: int4 (-8, 7) per-group affine (integer zero point), 1x4x1x1
int8 asymmetric: int8 (-128, 127) per-channel affine (integer zero point), axis 0
float8: float8_e4m3fn None per-channel symmetric, axis 0
float8, one scale: float8_e4m3fn None per-tensor symmetric
float8, groups: float8_e4m3fn None per-group symmetric, 1x4
float8, e5m2: float8_e5m2 None per-channel symmetric, axis 0""",
    )


def test_both_zeros_of_float8_are_zero():
    tensor, weight = stored("float8")
    tensor.qdata.view(torch.uint8)[0, :2] = torch.tensor([0, 128], dtype=torch.uint8)
    weight = read_tensor("weight", tensor)
    assert weight.zeros()[0, :2].all()
    weight.set_zero(torch.zeros(tensor.shape, dtype=torch.bool))
    assert tensor.qdata.view(torch.uint8).eq(0).all()


def test_float8_rows_of_zeros_do_not_become_nan():
    model, inputs = make("sequential")
    with torch.no_grad():
        model[0].weight[:4] = 0
    expected = model(*inputs)
    plain = copy.deepcopy(model)
    quantize_(plain, FLOAT8)
    assert plain(*inputs).isnan().all(), "torchao heals itself; the mending can go"
    quantized = quantize(model, inputs, FLOAT8).model
    assert quantized[0].weight.dequantize()[:4].eq(0).all()
    torch.testing.assert_close(quantized(*inputs), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("config", ["default", "dynamic int4"])
def test_training_with_fake_quantization(config, pattern, dtype):
    model, inputs = make("tied")
    model.to(dtype)
    before = snapshot(model)
    trained = {}

    def calibrate(prepared):
        assert isinstance(prepared.block, FakeQuantizedLinear)
        train(prepared, inputs)
        trained["weight"] = prepared.block.weight.detach().clone()
        trained["output"] = prepared(*inputs)

    quantized, verification = flow(
        model, inputs, "qat", pattern, config=CONFIGS[config], calibrate=calibrate
    )
    verification.raise_if_lost()
    assert [row.quantized for row in verification] == [True, True, True]
    assert all(row.zero_dequantized == row.wanted == row.elements // 2 for row in verification)
    assert_unchanged(model, before)
    assert type(quantized.block) is nn.Linear
    assert not quantized.block.training
    kept = trained["weight"] != 0
    assert not torch.equal(trained["weight"][kept], model.block.weight[kept])
    # What was trained is what came out: fake quantization and codes agree.
    torch.testing.assert_close(quantized(*inputs), trained["output"], rtol=1e-2, atol=1e-2)


def test_training_replaces_a_root_and_shared_modules():
    model, inputs = make("root")
    quantized, verification = flow(model, inputs, "qat", calibrate=lambda m: train(m, inputs))
    verification.raise_if_lost()
    assert type(model) is Root
    assert is_torchao(quantized.weight)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(8, 8)

        def forward(self, x):
            return self.second(F.relu(self.first(x)))

    model, inputs = Twice().eval(), (torch.randn(2, 8),)
    for order in ("sparsify_first", "quantize_first", "qat"):
        quantized, verification = flow(model, inputs, order, calibrate=lambda m: m(*inputs))
        verification.raise_if_lost()
        assert quantized.first is quantized.second
        assert {row.where for row in verification} == {"first.weight", "second.weight"}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_cannot_be_trained_is_refused_before_training():
    def never(model):
        raise AssertionError("trained")

    model, inputs = make("tied")
    with pytest.raises(
        BackendError, match=r"block.weight: .*Int8WeightOnlyConfig.*Unexpected base"
    ):
        flow(model, inputs, "qat", config=INT8, calibrate=never)
    odd = {nn.Embedding: ODD_GROUPS}
    with pytest.raises(BackendError, match=r"embed.weight: torchao cannot apply IntxWeightOnly"):
        flow(model, inputs, "qat", config=odd, calibrate=never)
    model, inputs = nn.Sequential(Doubled(8, 8)), (torch.randn(2, 8),)
    with pytest.raises(BackendError, match=r"0.weight: .* forward of Doubled would be lost"):
        flow(model, inputs, "qat", calibrate=never)
    assert flow(model, inputs, "sparsify_first")[1].raise_if_lost()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PACKED_INT4, "bottom.2.weight: torchao cannot apply Int4W.*ImportError: Requires mslk"),
        (ODD_GROUPS, "bottom.0.weight: torchao cannot apply IntxW.*AssertionError"),
        (LARGE_GROUPS, r"bottom.0.weight: torchao leaves .* \(16, 12\) .* in float, with Int4W"),
        ({nn.EmbeddingBag: ROWS}, "does not run on example_inputs: NotImplemented.*embedding_bag"),
        ({"bottom.1": INT8}, "config: bottom.1 names no parameter of two or more dimensions"),
        ({"re:bot": INT8, "top.0": INT8}, "config: re:bot names no parameter"),
        ({"top.0": 8}, "config: expected None or one of torchao's config.* for 'top.0', found 8"),
        ({8: INT8}, "config: expected module classes and names as keys, found 8"),
        ("int8", "config: expected one of torchao's configurations or a mapping to them"),
    ],
    ids=range(9),
)
def test_refusals_are_named_and_leave_the_model(config, message):
    model, inputs = make("recommender")
    before = snapshot(model)
    with pytest.raises(BackendError, match=message):
        quantize(model, inputs, config)
    assert_unchanged(model, before)
    assert not any(is_torchao(parameter) for parameter in model.parameters())


def test_live_masks_are_refused():
    model, inputs = make("sequential")
    weights = fxs.find_weights(model, inputs)
    fxs.prepare(model, fxs.WeightNormSparsifier(), inputs)
    with pytest.raises(BackendError, match=r"0.weight, 2.weight still masked"):
        get_backend("torchao").prepare(model, inputs, weights)


def kinds(model):
    return {
        name: type(parameter).__name__
        for name, parameter in model.named_parameters()
        if is_torchao(parameter)
    }


@pytest.mark.filterwarnings("ignore:Config Deprecation")
def test_names_and_patterns_and_classes_choose():
    model, inputs = make("recommender")
    config = {
        nn.Linear: INT8,
        "re:top\\..\\.weight": INT4,
        "top.2": None,
        "top.2.weight": FLOAT8,
        "bottom.0": None,
    }
    quantized, meant = quantize(model, inputs, config)
    expected = {
        "bottom.2.weight": "Int8Tensor",
        "top.0.weight": "IntxUnpackedToInt8Tensor",
        "top.2.weight": "Float8Tensor",
    }
    assert kinds(quantized) == expected
    assert meant == set(expected)
    names = FqnToConfig({"re:top\\..": INT4, "bottom.0.weight": None, "_default": INT8})
    quantized, meant = quantize(model, inputs, names)
    assert kinds(quantized) == expected | {"top.2.weight": "IntxUnpackedToInt8Tensor"}
    assert meant == set(expected)


def test_what_stays_in_float_is_not_meant():
    model, inputs = make("recommender")
    _, verification = flow(model, inputs, "sparsify_first", config={nn.Linear: INT8, "top.0": None})
    excluded, unnamed = "`config` has None for it", "no key of `config` names it"
    bags = {f"tables.{i}.weight": unnamed for i in range(3)}
    left = {row.fqn: row.in_float for row in verification.raise_if_lost() if not row.quantized}
    assert left == {"top.0.weight": excluded, **bags}
    assert {row.fqn for row in verification if not row.meant} == set(left)
    assert str(verification).count(f"ok, in float: {unnamed}") == 3

    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    inputs = (torch.randn(2, 3, 16),) * 3
    assert quantize(model, inputs, INT8).meant == set()
    with pytest.raises(BackendError, match="MultiheadAttention does not run on example_inputs"):
        quantize(model, inputs, {"out_proj": INT8})


def test_a_tie_is_meant_where_all_its_places_are():
    model, inputs = make("tied")
    quantized, meant = quantize(model, inputs, INT8)
    assert meant == {"block.weight"}
    assert set(kinds(quantized)) == {"block.weight", "head.weight"}
    for order in ("sparsify_first", "quantize_first"):
        _, verification = flow(model, inputs, order, config=INT8)
        verification.raise_if_lost()
        places = {row.where: row.quantized for row in verification}
        assert places == {"embed.weight": False, "block.weight": True, "head.weight": True}


class Experts(nn.Module):
    """A convolution, and experts in one parameter, of which one is read at a time."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return F.linear(x, self.experts[0]) + F.linear(x, self.experts[1])


@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first"])
def test_experts_and_convolutions_where_torchao_has_them(order):
    torch.manual_seed(0)
    model, inputs = Experts().eval(), (torch.randn(2, 4, 6, 6),)
    expected = model(*inputs)
    assert quantize(model, inputs, INT8).meant == set()
    config = {nn.Conv2d: ROWS, "experts": INT8}
    quantized, verification = flow(model, inputs, order, "unstructured 10%", config=config)
    verification.raise_if_lost()
    assert {row.fqn: row.quantized for row in verification} == {
        "stem.weight": True,
        "experts": True,
    }
    error = (quantized(*inputs) - expected).norm() / expected.norm()
    assert error < 0.1


def faults(verification):
    return {row.fqn: row.faults for row in verification if row.faults}


@pytest.mark.parametrize("config", ["default", "int4 asymmetric", "float8"])
def test_sabotage_is_found(config):
    model, inputs = make("sequential")
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    plain, _ = make("sequential")
    alone, meant = quantize(plain, inputs, CONFIGS[config])

    def check(change):
        quantized = quantize(model, inputs, CONFIGS[config]).model
        assert verify(quantized, record, reference=alone, meant=meant).ok
        keep = record["0.weight"].keep
        with torch.no_grad():
            change(quantized[0], keep)
        return faults(verify(quantized, record, reference=alone, meant=meant))

    def one_code(module, keep):
        row, column = (~keep).nonzero()[0]
        module.weight.qdata[row, column] = module.weight.qdata[keep][0]

    def one_zero(module, keep):
        read = read_tensor("", module.weight)
        rows, columns = (keep & ~read.zeros()).nonzero(as_tuple=True)
        code = read.zero_code().expand(keep.shape)[rows[0], columns[0]]
        module.weight.qdata[rows[0], columns[0]] = code

    def a_zero_point(module, keep):
        module.weight.zero_point += 1

    def left_out(module, keep):
        module.weight = nn.Parameter(module.weight.dequantize())

    masked = int((~record["0.weight"].keep).sum())
    assert check(one_code) == {"0.weight": (f"1 of {masked} zeros lost", "pattern 2:4 broken")}
    assert check(one_zero) == {"0.weight": ("1 zeros more than asked for",)}
    assert check(left_out) == {"0.weight": ("meant to be quantized, left in float",)}
    if config != "float8":
        lost = check(a_zero_point)["0.weight"]
        assert lost[0] == f"{masked} of {masked} zeros lost"


def test_fractional_zero_points_are_refused_when_masking_codes():
    model, inputs = make("sequential")
    weights = fxs.find_weights(model, inputs)
    quantized = quantize(model, inputs, ROWS).model
    weight = quantized[0].weight
    quantized[0].weight = nn.Parameter(
        IntxUnpackedToInt8Tensor(
            weight.qdata,
            weight.scale,
            torch.full_like(weight.scale, 0.5),
            torch.int8,
            weight.block_size,
            torch.float32,
            None,
        ),
        requires_grad=False,
    )
    before = [module.weight.qdata.clone() for module in (quantized[0], quantized[2])]
    with pytest.raises(ZeroNotRepresentableError, match=r"0.weight.*such as 0.5"):
        sparsify_codes(quantized, fxs.WeightNormSparsifier(), weights)
    after = [module.weight.qdata for module in (quantized[0], quantized[2])]
    assert all(map(torch.equal, before, after))


def test_packed_codes_are_an_obstacle():
    model, inputs = make("sequential")
    weights = fxs.find_weights(model, inputs)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs)
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    quantized = quantize(model, inputs, INT8).model
    codes = torch.zeros(8, 8, dtype=torch.int8)
    packed = Int4Tensor(codes, torch.ones(8, 8), torch.zeros(8, 8), [1, 2], torch.Size((8, 16)))
    quantized[2].weight = nn.Parameter(packed, requires_grad=False)
    found = {weight.fqn: weight for weight in read_weights(quantized)}
    assert found["2.weight"].obstacle == "codes of a Int4Tensor cannot be read"
    assert faults(verify(quantized, record, meant=weights)) == {
        "2.weight": ("codes of a Int4Tensor cannot be read",)
    }
    assert faults(verify(quantized)) == {"2.weight": ("codes of a Int4Tensor cannot be read",)}
    with pytest.raises(ValueError, match=r"2.weight cannot be masked: codes of a Int4Tensor"):
        sparsify_codes(quantized, fxs.WeightNormSparsifier(), weights)
    with pytest.raises(BackendError, match=r"2.weight: codes of a Int4Tensor cannot be written"):
        found["2.weight"].write(torch.zeros(8, 16))


def saved_and_loaded(what, weights_only=True):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_result_is_copied_saved_and_loaded(config):
    model, inputs = make("tied")
    quantized, verification = flow(model, inputs, "quantize_first", config=CONFIGS[config])
    expected = quantized(*inputs)
    stored = {w.where: w.data for w in read_weights(quantized)}
    copied = copy.deepcopy(quantized)
    whole = saved_and_loaded(quantized, weights_only=False)
    filled, _ = make("tied")
    filled.load_state_dict(saved_and_loaded(quantized.state_dict()), assign=True)
    for other in (copied, whole, filled):
        assert torch.equal(other(*inputs), expected)
        assert all(torch.equal(w.data, stored[w.where]) for w in read_weights(other))
    with torch.no_grad():
        copied.block.weight.qdata.zero_()
    assert torch.equal(quantized(*inputs), expected)


def test_the_default_compiles_and_leaves_inductor_as_it_is():
    from torch._inductor import config

    def settings():
        names = ("coordinate_descent_tuning", "epilogue_fusion", "force_fuse_int_mm_with_mul")
        return [getattr(config, name) for name in names], torch.get_float32_matmul_precision()

    before = settings()
    model, inputs = make("tied")
    quantized, _ = flow(model, inputs, "sparsify_first")
    assert settings() == before
    with torch.no_grad():
        expected = quantized(*inputs)
        torch._dynamo.reset()
        actual = torch.compile(quantized)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_interleaved_is_refused():
    model, inputs = make("sequential")
    with pytest.raises(BackendError, match="'torchao' has nothing to calibrate"):
        flow(model, inputs, "interleaved")


def test_other_models_hold_nothing_of_torchao():
    for name in ("bare", "convnet"):
        model, _ = make(name)
        assert list(TorchAOBackend().read(model)) == []


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.delitem(sys.modules, "fx_sparsity.quantization.torchao_backend", raising=False)
    with pytest.raises(BackendError, match=r'pip install "fx_sparsity\[torchao\]"'):
        get_backend("torchao")
