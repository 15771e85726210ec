"""Pruning and rounding at once: against float64, on the grid, and through torchao and files."""

import copy
import io

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import (
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from transformers.pytorch_utils import Conv1D

import fx_sparsity as fxs
from fx_sparsity.lowering.layers import DenseLinear, read_torchao
from fx_sparsity.pruning import Reconstruction
from fx_sparsity.pruning.methods import (
    ExactUpdate,
    MagnitudeSparsifier,
    Pipeline,
    Rounding,
    SparseGPTSparsifier,
    Statistics,
    Swaps,
    WandaSparsifier,
)
from fx_sparsity.quantization import BackendError, quantize_rounded
from tests.pruning.methods import plain_methods as reference
from tests.pruning.methods.layers import layer, loss, tiling_of

GRIDS = [(4, 32), (4, None), (3, 20), (8, None)]


def solve(rounding, weight, stats, pattern="unstructured", level=0.5):
    """What is found before rounding, and after."""
    tiling = tiling_of(pattern, weight)
    found = SparseGPTSparsifier().solve(weight, stats, tiling, level)
    return found, rounding.refine(weight, stats, tiling, level, found)


def spread(scales, width, group):
    return scales.repeat_interleave(group or width, -1)[..., :width]


def codes_of(solved, bits, group):
    """Whole numbers within the range, times scales bit for bit; checks that they are."""
    scale = spread(solved.scales, solved.weight.shape[-1], group)
    codes = (solved.weight.double() / scale.double()).round().float()
    assert torch.equal(codes * scale, solved.weight)
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() < 2 ** (bits - 1)
    return codes


def nearest_by_torchao(values, bits, group, dtype=torch.float32):
    """Float32 values at the scales that torchao chooses, rounded to `dtype`."""
    form = (1, group or values.shape[1]), getattr(torch, f"int{bits}")
    scale = IntxUnpackedToInt8Tensor.from_hp(values, *form).scale.to(dtype).float()
    tensor = IntxUnpackedToInt8Tensor.from_hp(
        values,
        *form,
        intx_choose_qparams_algorithm=None,
        custom_scale=scale,
        custom_zero_point=torch.zeros_like(scale, dtype=torch.int8),
    )
    return tensor.dequantize()


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize(("bits", "group"), GRIDS)
def test_against_plain_loops_in_float64(bits, group, passes):
    weight, stats = layer(6, 150)
    found, solved = solve(Rounding(bits, group, passes), weight, stats)
    codes = codes_of(solved, bits, group)[0]
    assert torch.equal(solved.mask, found.mask)
    gram = stats.gram[0]
    expected, scales = reference.rounding(
        weight[0], found.weight[0], found.mask[0], gram, bits, group, passes
    )
    assert (codes == expected).float().mean() > 0.97  # the others lie halfway in float32
    h = reference.damped(gram)
    best = expected * spread(scales, 150, group)
    assert loss(weight[0], solved.weight[0], h) == pytest.approx(loss(weight[0], best, h), rel=2e-3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 300),
    bits=st.integers(2, 8),
    group=st.none() | st.integers(1, 150),
    pattern=st.sampled_from(["unstructured", "2:4", "rows", "channels"]),
    level=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    passes=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dead=st.booleans(),
)
@example(  # the largest of a row lies between two codes
    rows=5,
    width=118,
    bits=4,
    group=None,
    pattern="unstructured",
    level=0.9,
    passes=0,
    dtype=torch.float32,
    dead=False,
)
def test_of_any_shape(rows, width, bits, group, pattern, level, passes, dtype, dead):
    pattern, level = ("unstructured", level) if width % 4 and pattern == "2:4" else (pattern, level)
    weight, stats = layer(rows, width, tokens=max(8, width // 2))
    if dead:
        stats.gram[:, 0] = stats.gram[:, :, 0] = 0
    if not stats.gram.any():
        return
    level = 0.5 if pattern == "2:4" else level
    found, solved = solve(
        Rounding(bits, group, passes, scale_dtype=dtype), weight, stats, pattern, level
    )
    codes = codes_of(solved, bits, group)
    assert torch.equal(solved.mask, found.mask)
    assert not codes[~solved.mask].any()
    assert torch.equal(solved.scales, solved.scales.to(dtype).float())
    size = min(group or width, width)
    if width % size or size == 1:  # torchao cannot
        return
    by_torchao = nearest_by_torchao(found.weight[0], bits, size, dtype)
    h = reference.damped(stats.gram[0])
    for row in range(rows):
        ours, theirs = (
            loss(weight[0, row : row + 1], v[row : row + 1], h)
            for v in (solved.weight[0], by_torchao)
        )
        assert ours <= theirs * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize(("bits", "group"), GRIDS)
def test_no_pass_raises_the_error_of_a_row(bits, group):
    weight, stats = layer(16, 160)
    h = reference.damped(stats.gram[0])
    before = torch.full((16,), torch.inf, dtype=torch.float64)
    for passes in range(4):
        _, solved = solve(Rounding(bits, group, passes), weight, stats)
        missed = (weight - solved.weight)[0].double()
        errors = torch.linalg.vecdot(missed @ h, missed)
        assert bool((errors <= before * (1 + 1e-5)).all())
        before = errors


def test_it_wins_back_what_rounding_to_nearest_adds():
    weight, stats = layer(64, 256)
    tiling = tiling_of("unstructured", weight)
    found = SparseGPTSparsifier().solve(weight, stats, tiling, 0.5)
    found = ExactUpdate().refine(weight, stats, tiling, 0.5, found)
    solved = Rounding(4, 32).refine(weight, stats, tiling, 0.5, found)
    nearest = nearest_by_torchao(found.weight[0], 4, 32)
    sparse, joint, plain = (
        loss(weight[0], v, stats.gram[0]) for v in (found.weight[0], solved.weight[0], nearest)
    )
    assert joint - sparse < 0.6 * (plain - sparse)


def test_groups_without_a_hessian_are_rounded_to_nearest_and_say_so():
    weight, stats = layer(6, 32, groups=2)
    stats.tokens[1] = 0
    stats.gram[1] = 0
    found, solved = solve(Rounding(4, 8), weight, stats)
    codes_of(solved, 4, 8)
    assert torch.equal(solved.mask, found.mask)
    assert any("rounded to nearest: " in note for note in solved.notes)
    table = Statistics(torch.tensor([9]), squares=torch.rand(1, 32))
    found, solved = solve(Rounding(8, None), weight[:1], table)
    codes_of(solved, 8, None)
    nearest = nearest_by_torchao(found.weight[0], 8, None)
    ours, theirs = (
        (table.squares * (v - found.weight).square()).sum() for v in (solved.weight, nearest)
    )
    assert ours <= theirs * (1 + 1e-5)


def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match="bits: expected 2 to 8, found 9"):
        Rounding(9)
    with pytest.raises(ValueError, match="group_size: expected a positive number"):
        Rounding(4, 0)
    with pytest.raises(ValueError, match="passes: expected zero or more"):
        Rounding(passes=-1)
    with pytest.raises(ValueError, match="scale_dtype: expected one of"):
        Rounding(scale_dtype=torch.int8)
    with pytest.raises(ValueError, match="Rounding rounds, and Swaps behind it"):
        Pipeline(SparseGPTSparsifier(), Rounding(), Swaps())
    inner = Pipeline(SparseGPTSparsifier(), Rounding())
    with pytest.raises(ValueError, match="Pipeline rounds, and Swaps behind it"):
        Pipeline(inner, Swaps())
    assert Pipeline(SparseGPTSparsifier(), Swaps()).grid is None


# -- through prune, torchao and files ------------------------------------------------------------


class Net(nn.Module):
    """Blocks of linear layers, so that every way to be sequential is a different one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)) for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def method(bits=4, group=32, dtype=torch.float32):
    return Pipeline(SparseGPTSparsifier(), Rounding(bits, group, passes=1, scale_dtype=dtype))


def pruned(model, sparsifier, x, pattern="2:4", **options):
    fxs.prune(model, sparsifier, [(x,)], pattern, progress=False, **options)
    fxs.squash(model, sparsifier)
    return model


def data(dtype=torch.float32, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (256, 64)), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "config"),
    [
        (4, 32, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
        (4, None, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))),
        (8, None, Int8WeightOnlyConfig(set_inductor_config=False)),
    ],
    ids=str,
)
def test_codes_reach_torchao_and_files_as_they_are(tmp_path, bits, group, config, dtype):
    torch.manual_seed(0)
    model, x = Net().to(dtype), data(dtype)
    sparsifier = method(bits, group, dtype)
    sequential = {32: True, None: "blocks" if bits == 4 else False}[group]
    pruned(model, sparsifier, x, sequential=sequential)
    before = copy.deepcopy(model.state_dict())
    quantized, verification, in_float = quantize_rounded(model, sparsifier)
    assert in_float == {}
    verification.raise_if_lost()
    assert len(verification) == 4
    assert all(row.quantized and row.meant and row.zero_in_code for row in verification)
    for fqn in sparsifier.names:
        weight, tensor = model.get_parameter(fqn), quantized.get_parameter(fqn)
        scales = sparsifier.state[fqn]["grid"]["scales"][0]
        assert isinstance(tensor, IntxUnpackedToInt8Tensor if bits == 4 else Int8Tensor)
        assert torch.equal(tensor.scale.float(), scales)
        assert torch.equal(tensor.dequantize(), weight)
        assert not tensor.qdata[~sparsifier.get_mask(fqn)].any()
        product = tensor.qdata.float() * spread(scales, weight.shape[1], group)
        assert torch.equal(product.to(dtype), weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.allclose(quantized(x), model(x), rtol=0.02, atol=0.02)
    fxs.save(quantized, tmp_path / "rounded")
    alike = Net().to(dtype)
    quantize_(alike, config)
    fxs.load(tmp_path / "rounded", alike)
    for name, parameter in quantized.named_parameters():
        there = alike.get_parameter(name)
        if name.endswith("weight"):
            assert torch.equal(there.qdata, parameter.qdata)
            assert torch.equal(there.scale, parameter.scale)
        else:
            assert torch.equal(there, parameter)
    fxs.verify(alike, verification.record).raise_if_lost()
    if bits == 8:
        assert isinstance(read_torchao(quantized.blocks[0][0].weight), DenseLinear)


def test_scales_are_in_the_state_of_the_sparsifier():
    torch.manual_seed(0)
    model, sparsifier = Net(), method()
    pruned(model, sparsifier, data())
    file = io.BytesIO()
    torch.save(sparsifier.state_dict(), file)
    file.seek(0)
    later = WandaSparsifier()
    later.load_state_dict(torch.load(file, weights_only=True))
    later.attach(model)
    first, second = quantize_rounded(model, sparsifier), quantize_rounded(model, later)
    for name in sparsifier.names:
        ours, theirs = first.model.get_parameter(name), second.model.get_parameter(name)
        assert torch.equal(ours.qdata, theirs.qdata)
        assert torch.equal(ours.scale, theirs.scale)


class Odd(nn.Module):
    """Weights that torchao has no tensors for, and two layers that are one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, groups=1)
        self.turned = Conv1D(16, 4 * 36)
        self.ragged = nn.Linear(16, 20)
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)
        self.second.weight = self.first.weight
        self.across = nn.Linear(30, 20)

    def forward(self, x):
        x = self.ragged(self.turned(self.conv(x).flatten(1)).relu())
        return self.second(self.first(x)) @ self.across.weight


def test_what_stays_in_float_is_on_the_grid_and_has_a_reason():
    torch.manual_seed(0)
    model, sparsifier = Odd(), method(4, 10)
    x = data(torch.float32, 64, 3, 8, 8)
    pruned(model, sparsifier, x, "unstructured 50%")
    quantized, verification, in_float = quantize_rounded(model, sparsifier)
    verification.raise_if_lost()
    linear = "torchao has linear layers alone, and it is the weight of a "
    assert in_float == {
        "conv.weight": linear + "Conv2d",
        "turned.weight": linear + "Conv1D",
        "ragged.weight": "groups of 10 do not divide its 16 inputs, as torchao needs",
        "across.weight": "it was pruned as another product than that of a linear layer",
    }
    assert quantized.first.weight is quantized.second.weight
    assert torch.allclose(quantized(x), model(x), atol=1e-5)
    scales = sparsifier.state["turned.weight"]["grid"]["scales"][0]
    ratio = model.turned.weight.detach().t() / spread(scales, 144, 10)
    assert (ratio - ratio.round()).abs().max() < 1e-4
    assert ratio.round().unique().numel() <= 16


def test_what_has_changed_since_is_left_in_float():
    torch.manual_seed(0)
    model, sparsifier = Net(), method()
    pruned(model, sparsifier, data())
    with torch.no_grad():
        model.blocks[0][0].weight.mul_(1.01)
    _, verification, in_float = quantize_rounded(model, sparsifier)
    assert list(in_float) == ["blocks.0.0.weight"]
    assert "no longer those that it was rounded to" in in_float["blocks.0.0.weight"]
    verification.raise_if_lost()


def test_refusals():
    torch.manual_seed(0)
    model, sparsifier = Net(), method()
    fxs.prune(model, sparsifier, [(data(),)], "2:4", progress=False)
    with pytest.raises(BackendError, match="squash before quantizing"):
        quantize_rounded(model, sparsifier)
    fxs.squash(model, sparsifier)
    with pytest.raises(BackendError, match="not bound to this Net"):
        quantize_rounded(copy.deepcopy(model), sparsifier)
    plain, other = Net(), SparseGPTSparsifier()
    pruned(plain, other, data())
    with pytest.raises(BackendError, match=r"none of blocks.0.0.weight, .* was rounded"):
        quantize_rounded(plain, other)
    with pytest.raises(ValueError, match="a checkpoint has no place for its scales"):
        fxs.prune_checkpoint(model, method(), [(data(),)], "2:4", source="a", target="b")


def test_a_rebuilt_model_is_rounded_afterwards():
    torch.manual_seed(0)
    model, x = Net(), data()
    before = copy.deepcopy(model.state_dict())
    rebuilding = Reconstruction(steps=5)
    with pytest.raises(ValueError, match="reconstruction: it would move weights off the grid"):
        pruned(model, method(), x, reconstruction=rebuilding)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pruned(model, SparseGPTSparsifier(), x, reconstruction=rebuilding)
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim == 2}
    sparsifier = Pipeline(MagnitudeSparsifier(), Rounding(4, 32))
    pruned(model, sparsifier, x)
    quantize_rounded(model, sparsifier).verification.raise_if_lost()
    for name, zero in zeros.items():
        assert not model.get_parameter(name)[zero].any()
        assert torch.equal(~sparsifier.get_mask(name), zero)
