"""compressed-tensors' layouts, made here from their definition and compared part for part."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fx_sparsity as fxs
from tests.storage.test_formats import same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]


def two_four(shape, dtype):
    """A weight with exactly two values of every four that are not zero."""
    weight = (torch.randn(shape) * 20).to(torch.float32)
    weight[weight.abs() < 1] = 1
    weight.view(-1, 4)[torch.rand(weight.numel() // 4, 4).argsort(1) < 2] = 0
    return weight.to(dtype)


def by_definition(weight, layout):
    """The parts, bit by bit in plain Python."""
    rows, columns = weight.shape
    bits = weight.float() != 0
    packed = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    for r, c in bits.nonzero().tolist():
        packed[r, c // 8] += 1 << c % 8
    integers = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[weight.itemsize])
    values = integers[bits].view(weight.dtype)
    parts = {"l.bitmask": packed, "l.shape": torch.tensor([rows, columns]), "l.compressed": values}
    if layout == "sparse-bitmask":
        counts = bits.sum(1).tolist()
        return parts | {"l.row_offsets": torch.tensor([sum(counts[:r]) for r in range(rows)])}
    return parts | {
        "l.shape": torch.tensor([[rows], [columns]]),
        "l.compressed": values.view(rows, columns // 2),
    }


@pytest.mark.parametrize("layout", ["sparse-bitmask", "sparse-24-bitmask"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64), (9, 36), (40, 24)])
def test_written_and_read_as_defined(layout, dtype, shape, tmp_path):
    weight, bias = two_four(shape, dtype), torch.ones(3)
    expected = by_definition(weight, layout)
    fxs.export({"l.weight": weight, "l.bias": bias}, tmp_path / "ours", layout=layout)
    parts = load_file(tmp_path / "ours")
    if "l.weight" not in parts:  # which stays dense where that is smaller
        assert parts.keys() == {"l.bias", *expected}
        assert all(same_bits(parts[name], part) for name, part in expected.items())
    save_file(expected | {"l.bias": bias}, tmp_path / "theirs")
    loaded = fxs.load(tmp_path / "theirs")
    assert loaded.keys() == {"l.weight", "l.bias"}
    assert same_bits(loaded["l.weight"], weight)


def test_the_configuration_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "toy", "quantization_config": {"a": 1}}')
    state = {"l.weight": two_four((32, 64), torch.float16), "m.weight": torch.randn(32, 64)}
    fxs.export(state, tmp_path / "model.safetensors", layout="sparse-24-bitmask")
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "toy",
        "quantization_config": {
            "a": 1,
            "quant_method": "compressed-tensors",
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "global_sparsity": 0.5,
                "ignore": ["m"],
                "registry_requires_subclass": False,
                "sparsity_structure": "2:4",
                "targets": ["l"],
            },
        },
    }


def test_dense_is_the_default_and_needs_no_configuration(tmp_path):
    weight = two_four((32, 64), torch.float16)
    fxs.export({"l.weight": weight}, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert same_bits(load_file(tmp_path / "model.safetensors")["l.weight"], weight)
    with pytest.raises(ValueError, match="layout: expected one of"):
        fxs.export({"l.weight": weight}, tmp_path / "x", layout="sparse")
    with pytest.raises(TypeError, match="t: expected a strided tensor of plain numbers"):
        fxs.export({"t": (weight, None)}, tmp_path / "x")
