import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import fx_sparsity as fxs
from fx_sparsity.storage import FORMATS, FileFormatError, smallest_format
from tests.models import make

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
]


@given(
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from(DTYPES),
    st.floats(0, 1),
    st.sampled_from(sorted(FORMATS)),
    st.integers(0, 2**31),
)
def test_every_format_is_exact_to_the_bit(shape, dtype, density, name, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    bits[torch.rand(shape, generator=generator) >= density] = 0
    tensor = bits.view(dtype).view(shape)
    parts = FORMATS[name].encode(tensor)
    decoded = FORMATS[name].decode(parts, shape, "t")
    assert decoded.dtype == dtype
    assert decoded.shape == tensor.shape
    assert torch.equal(decoded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert sum(part.nbytes for part in parts.values()) == FORMATS[name].size(tensor)


def test_negative_zeros_come_back():
    tensor = torch.tensor([0.0, -0.0, 0.0, 1.0])
    decoded = FORMATS["bitmask"].decode(FORMATS["bitmask"].encode(tensor), (4,), "t")
    assert torch.equal(torch.signbit(decoded), torch.signbit(tensor))


def test_a_sparse_model_shrinks_and_loads_back(tmp_path):
    model, inputs = make("tied")
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("unstructured 90%"))
    sparsifier.step()
    model, _ = fxs.squash(model, sparsifier)
    path = tmp_path / "model.safetensors"
    fxs.save(model, path)
    other, _ = make("tied")
    with torch.no_grad():
        other.embed.weight.fill_(9)
    fxs.load(path, other)
    assert torch.equal(other(*inputs), model(*inputs))
    assert other.head.weight is other.embed.weight
    assert list(tmp_path.iterdir()) == [path]


def test_half_of_a_bf16_matrix_takes_at_most_57_percent(tmp_path):
    weight = torch.randn(1024, 1024).bfloat16()
    weight[torch.rand(1024, 1024) < 0.5] = 0
    fxs.save({"w": weight}, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_size <= 0.57 * weight.nbytes
    assert torch.equal(fxs.load(tmp_path / "w.safetensors")["w"], weight)


def test_dense_stays_dense_and_plain_files_load(tmp_path):
    tensor = torch.randn(64)
    assert smallest_format(tensor) == "dense"
    save_file({"t": tensor}, tmp_path / "plain.safetensors")
    assert torch.equal(fxs.load(tmp_path / "plain.safetensors")["t"], tensor)


def test_views_are_saved_alone(tmp_path):
    base = torch.randn(1000, 8)
    fxs.save({"row": base[3]}, tmp_path / "f.safetensors")
    assert (tmp_path / "f.safetensors").stat().st_size < 1000
    assert torch.equal(fxs.load(tmp_path / "f.safetensors")["row"], base[3])


def test_ties_are_told_apart_by_the_state_not_by_copies(tmp_path, monkeypatch):
    tensors = {f"t{i}": torch.full((64, 64), float(i % 2)) * torch.eye(64) for i in range(6)}
    tensors["tied"] = tensors["t1"]
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as on another device
    fxs.save(tensors, tmp_path / "f.safetensors")
    loaded = fxs.load(tmp_path / "f.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["tied"] is loaded["t1"]


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "a quantized one"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path, tensor, found):
    with pytest.raises(TypeError, match=f"t: expected a strided tensor.*{found}"):
        fxs.save({"t": tensor}, tmp_path / "f.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.safetensors"
    fxs.save({"t": torch.ones(3)}, path)
    with pytest.raises(TypeError, match="extra: expected a tensor, found int"):
        fxs.save({"t": torch.zeros(3), "extra": 3}, path)
    assert fxs.load(path)["t"].sum() == 3


@pytest.mark.parametrize(
    ("parts", "entry", "message"),
    [
        (
            {"t::bitmask": torch.tensor([255], dtype=torch.uint8)},
            {"format": "bitmask"},
            "t: expected parts",
        ),
        ({"t": torch.ones(4)}, {"format": "dense", "shape": [5]}, r"t: expected shape \(5,\)"),
        ({"t": torch.ones(4)}, {"format": "pickle"}, "t: expected a format of dense, bitmask"),
        ({}, {"same_as": "u"}, "t: tied to 'u'"),
        (
            {"t::bitmask": torch.tensor([3], dtype=torch.uint8), "t::values": torch.ones(3)},
            {"format": "bitmask"},
            "t: expected 2 values",
        ),
    ],
)
def test_files_that_contradict_themselves(tmp_path, parts, entry, message):
    header = {"version": 1, "tensors": {"t": {"shape": [8], **entry}}}
    path = tmp_path / "bad.safetensors"
    save_file(parts, path, metadata={"fx_sparsity": json.dumps(header)})
    with pytest.raises(FileFormatError, match=message):
        fxs.load(path)
