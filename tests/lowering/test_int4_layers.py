"""Layers of 4 bits: what torchao makes of them is lowered, verified, saved and put back."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    quantize_,
)

import fx_sparsity as fxs
from fx_sparsity.lowering import check_packed, timing
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.packed_weights import read_packed
from fx_sparsity.lowering.policy import _fastest, _up_to_dense

CONFIGS = {
    "dynamic": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ),
    "weight only": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)),
    "channels": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)),
    "affine": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,
        weight_granularity=PerGroup(32),
        weight_mapping_type=MappingType.ASYMMETRIC,
    ),
}
RULES = {"2:4": "nm", "unstructured 50%": "bitmask", "block:32x32 50%": "block", None: "dense_int4"}
X = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))


def quantized(name, mapping, dtype=torch.float32):
    """A pruned model in 4 bits, and its record."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64)).to(dtype).eval()
    record = None
    if mapping is not None:
        sparsifier = fxs.WeightNormSparsifier()
        model = fxs.prepare(model, sparsifier, (X.to(dtype),), mapping)
        sparsifier.step()
        model, record = fxs.squash(model, sparsifier)
    quantize_(model, CONFIGS[name])
    return model, record


QUICK = [("affine", "2:4"), ("dynamic", "unstructured 50%"), ("channels", "block:32x32 50%")]
CASES = [
    pytest.param(name, mapping, marks=[] if quick else [pytest.mark.exhaustive])
    for name in sorted(CONFIGS)
    for mapping in RULES
    for quick in [(name, mapping) in [*QUICK, ("weight only", None)]]
]


@pytest.mark.parametrize(("name", "mapping"), CASES)
def test_lowered_verified_saved_and_put_back(name, mapping, tmp_path):
    dtype = torch.bfloat16 if name == "weight only" else torch.float32
    model, record = quantized(name, mapping, dtype)
    x, before = X.to(dtype), copy.deepcopy(model)
    one_group = name == "channels"
    rule = RULES[mapping] + ("_int4" if one_group and mapping is not None else "")
    lowered, report = fxs.lower(copy.deepcopy(model), (x,), policy=rule)
    assert {row.kernel for row in report.rows} == {RULES[mapping].removesuffix("_int4") + "_int4"}
    assert report.bytes_after < 0.8 * report.bytes_before
    torch.testing.assert_close(lowered(x), before(x), atol=0.03, rtol=0.03)
    check_packed(lowered)
    if record is not None:
        assert fxs.verify(lowered, record).ok
    fxs.save(lowered, tmp_path / "model.safetensors")
    again, _ = fxs.lower(copy.deepcopy(model), (x,), policy=rule)
    again[0].values.zero_()
    fxs.load(tmp_path / "model.safetensors", again)
    assert torch.equal(again(x), lowered(x))
    dense = fxs.unlower(lowered)
    for place in (0, 2):
        found, wanted = dense[place].weight, before[place].weight
        for part in ("qdata", "scale", "zero_point"):
            assert torch.equal(getattr(found, part), getattr(wanted, part))
    assert torch.equal(dense(x), before(x))


def test_a_file_is_loaded_into_packings_of_four_bits(tmp_path):
    model, _ = quantized("dynamic", "2:4")
    fxs.save(model, tmp_path / "model.safetensors")
    target, _ = quantized("dynamic", None)
    fxs.load_sparse(tmp_path / "model.safetensors", target)
    assert target[0].packing in ("nm_int4", "bitmask_int4")
    torch.testing.assert_close(target(X), model(X))


def test_an_exported_program_calls_the_operator():
    model, record = quantized("dynamic", "2:4")
    wanted = model(X)
    lowered, _ = fxs.lower(model, (X,), policy="nm")
    program = torch.export.export(lowered, (X,))
    check_packed(program)
    assert fxs.verify(program, record).ok
    torch.testing.assert_close(program.module()(X), wanted)


def test_packages_are_read_without_zero_points():
    """AOTInductor writes into the code what is as small as those of symmetric codes."""
    model, _ = quantized("dynamic", "2:4")
    layer = fxs.lower(model, (X,), policy="nm")[0][0]
    graph = torch.fx.Graph()
    arguments = {name: graph.get_attr(f"0.{name}") for name in ("values", "scale", "row_sums")}
    arguments |= {name: graph.placeholder(name) for name in ("x", "zero_points")}
    arguments |= {"bias": None, "in_features": 128, "out_features": 64}
    arguments |= {"quantize_input": "token_affine", "activation": "none"}
    graph.call_function(torch.ops.fx_sparsity.nm_linear.int4, (), arguments)
    (stored,) = read_packed(torch.fx.GraphModule(nn.Sequential(layer), graph))
    assert not stored.obstacle
    assert torch.equal(stored.data, layer.dense_codes())


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", ["dynamic", "affine"])
def test_packages_are_verified(config, tmp_path):
    model, record = quantized(config, "2:4")
    with torch.inference_mode():
        lowered, _ = fxs.lower(copy.deepcopy(model), (X,), policy="nm")
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(lowered, (X,)), package_path=str(tmp_path / "model.pt2")
        )
    assert fxs.verify(package, record).ok
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(X), model(X))


def test_reports_call_dense_what_is_dense():
    model, _ = quantized("dynamic", None)
    _, report = fxs.lower(model, (X,), policy="always")
    assert "2 of 2 weights lowered, 2 of them by kernels for dense weights" in report.summary


@pytest.mark.parametrize(("sparse", "chosen"), [(2.5, "nm_int4"), (2.01, "dense_int4")])
def test_what_dense_does_as_well_is_left_to_dense(sparse, chosen):
    def timed(gain):
        return {1: timing.Timing("eager", 100.0, 100.0 / gain, gain, gain)}

    choice = _fastest({"nm_int4": timed(sparse), "dense_int4": timed(2.0)}, False)
    assert choice.packing == chosen


def test_packings_larger_than_dense_are_not_tried():
    assert _up_to_dense(["nm_int4", "dense_int4", "bitmask_int4"]) == ["nm_int4", "dense_int4"]
    assert _up_to_dense(["nm", "bitmask"]) == ["nm", "bitmask"]


def test_the_rival_is_what_torch_runs_of_such_a_layer():
    """Its own product of 4-bit codes takes other tensors: the model would be left as slow as it is."""
    codes = torch.randint(-7, 8, (64, 64), dtype=torch.int8)
    layer = DenseLinear(codes, scale=torch.rand(64, 2))
    forms = timing._dense_forms(layer, torch.bfloat16)
    assert forms
    x = torch.randn(2, 64).bfloat16()
    wanted = x.float() @ (codes * layer.scale.repeat_interleave(32, 1)).T
    for name, (make, dtype) in forms.items():
        assert name.startswith("dequantized")
        assert dtype == torch.bfloat16
        torch.testing.assert_close(make(layer)(x).float(), wanted, atol=0.2, rtol=0.05)


def test_eight_bits_by_groups_stay_dense():
    model = nn.Sequential(nn.Linear(128, 64))
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(32)))
    _, report = fxs.lower(model, (X,), policy="always")
    (reason,) = report.dense.values()
    assert "four bits hold -8 to 7" in reason


@pytest.mark.parametrize("config", ["weight only", "channels"])
def test_codes_of_transposed_layers_stay_dense(config):
    """Theirs are grouped along the outputs, and torchao itself cannot run them."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(64, 64))
    quantize_(model, CONFIGS[config], filter_fn=lambda module, _: isinstance(module, Conv1D))
    lowered, report = fxs.lower(model, policy="always")
    assert type(lowered[0]) is Conv1D
    assert "stored [in, out]" in report.dense["0.weight"]
