"""Saving and loading whole states: models, ties, quantized ones; failures that change nothing."""

import cProfile
import gc
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.storage import CompressedFile, FileFormatError, container, faults
from fx_sparsity.storage.container import replacing
from tests.models import make
from tests.storage.test_formats import same_bits


def test_a_sparse_model_shrinks_and_loads_back(tmp_path):
    model, inputs = make("tied")
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("unstructured 90%"))
    sparsifier.step()
    model, _ = fxs.squash(model, sparsifier)
    path = tmp_path / "model.safetensors"
    fxs.save(model, path)
    assert path.stat().st_mode & 0o077 == 0o666 & ~_umask() & 0o077
    other, _ = make("tied")
    with torch.no_grad():
        other.embed.weight.fill_(9)
    before = {name: p.data_ptr() for name, p in other.named_parameters()}
    fxs.load(path, other)
    assert torch.equal(other(*inputs), model(*inputs))
    assert other.head.weight is other.embed.weight
    assert {name: p.data_ptr() for name, p in other.named_parameters()} == before
    assert list(tmp_path.iterdir()) == [path]
    assert faults(path) == []


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_user_can_look_into_the_file(tmp_path):
    weight = torch.randn(64, 64)
    weight[torch.rand(64, 64) < 0.8] = 0
    fxs.save({"w": weight, "b": torch.ones(3)}, tmp_path / "f.safetensors")
    parts = load_file(tmp_path / "f.safetensors")
    assert sorted(parts) == ["b", "w::bitmask", "w::values"]
    assert parts["w::values"].dtype == torch.float32
    stored = weight[weight != 0]
    assert torch.equal(parts["w::values"][: len(stored)], stored)


def test_half_of_a_bf16_matrix_takes_at_most_57_percent(tmp_path):
    weight = torch.randn(1024, 1024).bfloat16()
    weight[torch.rand(1024, 1024) < 0.5] = 0
    fxs.save({"w": weight}, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_size <= 0.57 * weight.nbytes
    assert torch.equal(fxs.load(tmp_path / "w.safetensors")["w"], weight)


def test_plain_files_load(tmp_path):
    tensors = {"t": torch.randn(64), "u": torch.ones(3, dtype=torch.uint8), "e": torch.empty(0, 2)}
    save_file(tensors, tmp_path / "plain.safetensors")
    loaded = fxs.load(tmp_path / "plain.safetensors")
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    assert faults(tmp_path / "plain.safetensors") == []


def test_every_tensor_is_aligned(tmp_path):
    state = {f"t{i}": torch.ones(i, dtype=torch.int8) for i in range(1, 9)}
    state |= {"d": torch.ones(5, dtype=torch.float64), "h": torch.ones(3).half()}
    fxs.save(state, tmp_path / "f")
    file = CompressedFile(tmp_path / "f").file
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in file.entries.values())
    shifted = (tmp_path / "f").read_bytes()
    length = int.from_bytes(shifted[:8], "little")
    shifted = (
        (length + 1).to_bytes(8, "little") + shifted[8 : 8 + length] + b" " + shifted[8 + length :]
    )
    (tmp_path / "f").write_bytes(shifted)  # as others may write them
    assert all(same_bits(t, state[name]) for name, t in fxs.load(tmp_path / "f").items())


def test_loaded_tensors_can_be_written_to_and_the_file_stays(tmp_path):
    fxs.save({"t": torch.ones(1000)}, tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    fxs.load(tmp_path / "f")["t"].zero_()
    assert (tmp_path / "f").read_bytes() == content


def test_views_are_saved_alone(tmp_path):
    base = torch.randn(1000, 8)
    fxs.save({"row": base[3], "columns": base.t()[:2]}, tmp_path / "f.safetensors")
    assert (tmp_path / "f.safetensors").stat().st_size < 10_000
    loaded = fxs.load(tmp_path / "f.safetensors")
    assert torch.equal(loaded["row"], base[3])
    assert torch.equal(loaded["columns"], base.t()[:2])


def test_ties_are_known_by_the_state_not_by_copies(tmp_path, monkeypatch):
    tensors = {f"t{i}": torch.full((64, 64), float(i % 2)) * torch.eye(64) for i in range(6)}
    tensors["tied"] = tensors["t1"]
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as on another device
    fxs.save(tensors, tmp_path / "f.safetensors")
    loaded = fxs.load(tmp_path / "f.safetensors")
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["tied"] is loaded["t1"]


def test_a_state_that_does_not_fit_leaves_the_model_alone(tmp_path):
    fxs.save({"weight": torch.ones(2, 2), "more": torch.ones(1)}, tmp_path / "f")
    model = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="bias: not in the file\nmore: not in the model"):
        fxs.load(tmp_path / "f", model)
    fxs.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "f")
    with pytest.raises(RuntimeError, match=r"weight: expected shape \(2, 2\), found \(2, 3\)"):
        fxs.load(tmp_path / "f", model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_other_dtypes_are_cast_into_the_model(tmp_path):
    fxs.save(nn.Linear(3, 3).bfloat16(), tmp_path / "f")
    model = nn.Linear(3, 3)
    fxs.load(tmp_path / "f", model)
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight.bfloat16(), fxs.load(tmp_path / "f")["weight"])


# -- quantized models ----------------------------------------------------------------------------


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.EmbeddingBag(40, 32, mode="sum")
        self.fc = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.relu(self.fc(self.items(x))))


def quantized(backend):
    model = Quantizable().eval()
    basket = torch.randint(40, (6, 5))
    mapping = fxs.SparsityMapping().set_global("unstructured 50%")
    model, _ = fxs.sparsify_and_quantize(
        model,
        fxs.WeightNormSparsifier(),
        (basket,),
        order="sparsify_first",
        backend=backend,
        mapping=mapping,
    )
    return model, basket


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "fx", "torchao"])
def test_quantized_models_come_back_bit_for_bit(backend, tmp_path):
    model, basket = quantized(backend)
    other, _ = quantized(backend)
    assert not torch.equal(model(basket), other(basket))
    fxs.save(model, tmp_path / "f")
    fxs.load(tmp_path / "f", other, check=True)
    assert torch.equal(model(basket), other(basket))
    fxs.save(other, tmp_path / "g")
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_keep_codes_scales_and_zero_points(tmp_path):
    x = torch.randn(6, 8)
    scales, points = torch.rand(6).double() + 0.1, torch.arange(6)
    state = {
        "tensor": torch.quantize_per_tensor(x, 0.1, 3, torch.quint8),
        "channel": torch.quantize_per_channel(x, scales, points, 0, torch.qint8),
        "float": torch.quantize_per_channel(x, scales.float(), points / 7, 0, torch.quint8),
        "wide": torch.quantize_per_tensor(x, 0.1, 0, torch.qint32),
        "plain": x,
    }
    fxs.save(state, tmp_path / "f")
    loaded = fxs.load(tmp_path / "f")
    assert list(loaded) == list(state)
    for name, tensor in list(state.items())[:-1]:
        found = loaded[name]
        assert torch.equal(found.int_repr(), tensor.int_repr())
        assert found.qscheme() == tensor.qscheme()
        assert found.dtype == tensor.dtype
        assert torch.equal(found.dequantize(), tensor.dequantize())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_codes_shrink_whatever_their_zero_point(axis, tmp_path):
    weight = torch.randn(64, 512).clamp(-2, 2)
    weight[torch.rand(64, 512) < 0.9] = 0
    if axis is None:
        tensor = torch.quantize_per_tensor(weight, 0.02, 131, torch.quint8)
    else:
        points = torch.randint(100, 150, (weight.shape[axis],))
        tensor = torch.quantize_per_channel(
            weight, torch.full(points.shape, 0.02), points, axis, torch.quint8
        )
    fxs.save({"w": tensor}, tmp_path / "f")
    assert CompressedFile(tmp_path / "f").stored_bytes("w/codes") < 0.25 * tensor.numel()
    assert torch.equal(fxs.load(tmp_path / "f")["w"].int_repr(), tensor.int_repr())


@pytest.mark.filterwarnings("ignore")
def test_a_torchao_tensor_needs_a_model_that_is_quantized_alike(tmp_path):
    model, _ = quantized("torchao")
    fxs.save(model, tmp_path / "f")
    with pytest.raises(TypeError, match="items.weight is a .*Int8AnyUseTensor: pass a model"):
        fxs.load(tmp_path / "f")
    plain = Quantizable()
    before = plain.fc.weight.detach().clone()
    with pytest.raises(RuntimeError, match="fc.weight: expected torchao.*found Parameter"):
        fxs.load(tmp_path / "f", plain)
    assert torch.equal(plain.fc.weight, before)


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.eye(3).to_sparse(), "expected a strided tensor.*torch.sparse_coo"),
        (3, "expected a tensor, found int"),
        ((torch.ones(1), object()), "expected a tensor, found object"),
        (
            torch.quantize_per_channel(
                torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint4x2
            ),
            "expected a tensor of qint8, quint8, qint32, found a quantized one of quint4x2",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_and_the_old_file_stays(tmp_path, value, found):
    path = tmp_path / "f.safetensors"
    fxs.save({"t": torch.ones(3)}, path)
    with pytest.raises(TypeError, match=f"bad(/1)?: {found}"):
        fxs.save({"t": torch.zeros(3), "bad": value}, path)
    assert fxs.load(path)["t"].sum() == 3
    assert list(tmp_path.iterdir()) == [path]


# -- faults --------------------------------------------------------------------------------------


def test_a_flipped_payload_is_found_on_request(tmp_path):
    path = tmp_path / "f"
    weight = torch.eye(64)
    fxs.save({"w": weight, "v": torch.randn(64)}, path)
    content = bytearray(path.read_bytes())
    place = CompressedFile(path).file.entries["v"].start
    content[place] ^= 1
    path.write_bytes(content)
    fxs.load(path)
    with pytest.raises(FileFormatError, match="^v: expected checksum"):
        fxs.load(path, check=True)
    assert [fault.split(":")[0] for fault in faults(path)] == ["v"]


@pytest.mark.parametrize("end", [0, 4096])
def test_what_was_checked_is_what_comes_back(end, tmp_path):
    """Also where the file is overwritten, or cut off, right after."""
    path = tmp_path / "f"
    tensors = {"w": torch.randn(64, 64), "sparse": torch.randn(64, 64) * (torch.rand(64, 64) < 0.2)}
    fxs.save(tensors, path)
    state = fxs.load(path, check=True)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.truncate(end)
    assert all(same_bits(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("place", range(4))
def test_a_load_that_fails_says_how_far_it_came_and_can_be_repeated(place, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    fxs.save(model, tmp_path / "f")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    read = []

    def failing(self, name, target):
        if len(read) == place:
            raise FileFormatError(f"{name}: injected")
        read.append(name)
        return usual(self, name, target)

    usual = CompressedFile.fill
    monkeypatch.setattr(CompressedFile, "fill", failing)
    with pytest.raises(FileFormatError, match="injected") as caught:
        fxs.load(tmp_path / "f", other)
    monkeypatch.undo()
    assert caught.value.__notes__[0].startswith(f"{place} of 4 entries are loaded")
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, (model.state_dict() if name in read else before)[name])
    fxs.load(tmp_path / "f", other)
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("kernels", ["1", "0"])
@pytest.mark.parametrize("bits", [0x00, 0xFF])
@pytest.mark.parametrize("form", ["bitmask", "two_four"])
def test_a_file_that_changes_after_it_was_opened_is_not_decoded(
    tmp_path, monkeypatch, form, bits, kernels
):
    monkeypatch.setenv("FX_SPARSITY_KERNELS", kernels)
    weight = torch.zeros(300, 256)
    weight[:, 1::4] = 1
    weight[:, 2::4] = 2
    path = tmp_path / "f.safetensors"
    fxs.save({"w": weight}, path, form=form)
    file = CompressedFile(path)
    assert torch.equal(file.tensor("w"), weight)
    with open(path, "r+b") as raw:
        raw.seek(file.file.entries["w::bitmask"].start + 5)
        raw.write(bytes([bits]))
    with pytest.raises(FileFormatError, match="w: not as it was when .*f.safetensors was opened"):
        file.tensor("w")


def test_a_header_that_was_tampered_with_is_refused(tmp_path):
    path = tmp_path / "f"
    fxs.save({"w": torch.ones(8, 4)}, path)
    path.write_bytes(path.read_bytes().replace(b'"shape":[8,4]', b'"shape":[4,8]'))
    with pytest.raises(FileFormatError, match="does not match the header's checksum"):
        fxs.load(path)


@pytest.mark.parametrize("gone", [b'"fx_sparsity"', b'"fx_sparsity_checksum"'])
def test_a_file_without_its_description_is_not_taken_for_another(tmp_path, gone):
    path = tmp_path / "f"
    fxs.save({"w": torch.eye(64)}, path)
    path.write_bytes(path.read_bytes().replace(gone, gone.replace(b"fx", b"ax")))
    with pytest.raises(FileFormatError, match="of a compressed file|does not match the header"):
        fxs.load(path)


def test_an_older_version_is_refused(tmp_path):
    path = tmp_path / "f"
    save_file({"t": torch.ones(4)}, path, metadata={"fx_sparsity": json.dumps({"version": 1})})
    with pytest.raises(FileFormatError, match="header"):
        fxs.load(path)


KILLED = """
import sys, torch, fx_sparsity as fxs
path, fill = sys.argv[1:]
state = {f"t{i}": torch.full((256, 1024), float(fill)) for i in range(8)}
print("go", flush=True)
while True:
    fxs.save(state, path)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.exhaustive)])
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path, kills):
    path = tmp_path / "f"
    generator = torch.Generator().manual_seed(kills)
    fxs.save({f"t{i}": torch.zeros(256, 1024) for i in range(8)}, path)
    seen = set()
    for i in range(1, kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(i)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(0.2 * torch.rand((), generator=generator).item())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        state = fxs.load(path, check=True)
        values = {tensor.unique().item() for tensor in state.values()}
        assert len(state) == 8
        assert len(values) == 1
        assert values <= {*seen, 0.0, float(i)}
        seen |= values
    assert len(seen) > (kills > 9)


def test_what_a_killed_save_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    path = tmp_path / "model.safetensors"
    left = [tmp_path / f".model.safetensors.{digits}.part" for digits in ("0" * 12, "9f" * 6, "x")]
    others = [
        tmp_path / f".model.safetensors.bak.{'0' * 12}.part",  # of another file
        tmp_path / ".model.safetensors.part",
    ]
    for file in (*left, *others):
        file.touch()
    with replacing(path) as ours:  # a second process at the same time
        ours.write(b"ours")
        fxs.save({"a": torch.ones(2)}, path)
        assert not any(file.exists() for file in left)
    assert path.read_bytes() == b"ours"
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
def test_a_file_that_is_replaced_keeps_its_permissions(mode, tmp_path):
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    for file in (path, config):
        file.write_text("{}")
        file.chmod(mode)
    fxs.save({"a": torch.ones(2)}, path)
    assert path.stat().st_mode & 0o7777 == mode
    fxs.export({"a.weight": torch.eye(64)}, path, layout="sparse-bitmask")
    assert {file.stat().st_mode & 0o7777 for file in (path, config)} == {mode}


@pytest.mark.parametrize("write", [fxs.save, fxs.export])
def test_opening_takes_four_times_the_calls_for_four_times_as_many_tensors(write, tmp_path):
    """And one garbage collection, which is due at the end: each goes through torch's objects."""
    collections = []

    def calls(count):
        path = tmp_path / str(count)
        write({f"layers.{i}.weight": torch.eye(4) for i in range(count)}, path)
        profile = cProfile.Profile()
        gc.callbacks.append(lambda phase, info: collections.append(phase))
        try:
            profile.runcall(CompressedFile, path)
        finally:
            gc.callbacks.pop()
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(10_000) < 4.2 * calls(2_500)
    assert collections.count("start") <= 2  # for two files


def test_names_that_are_listed_twice_are_counted_once(tmp_path):
    """A hostile header of very many."""
    entries = ",".join(f'"{i % 50_000}":{{}}' for i in range(100_000))
    text = ("{" + entries + "}").encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FileFormatError, match="0: listed twice"):
        fxs.load(tmp_path / "f")


def test_no_header_is_written_that_is_too_long_to_be_read(tmp_path, monkeypatch):
    """The room for it is an estimate, and generous."""
    monkeypatch.setattr(container, "_LONGEST_HEADER", 2048)
    path, state = tmp_path / "f", {f"{i}": torch.eye(64) for i in range(4)}
    fxs.save(state, path)
    assert fxs.load(path, check=True).keys() == state.keys()
    with pytest.raises(ValueError, match="in a room of 2048; write shards"):
        fxs.save({f"{i}": torch.eye(64) for i in range(99)}, path)
    assert fxs.load(path).keys() == state.keys()
