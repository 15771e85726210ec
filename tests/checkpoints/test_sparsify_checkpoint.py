"""Checkpoints: folders of shards, sparsified and converted tensor by tensor."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.checkpoints import (
    Checkpoint,
    CheckpointError,
    convert,
    find_checkpoint_weights,
    stated_patterns,
)
from fx_sparsity.graph import MappingError
from fx_sparsity.masks import Rank, global_masks, tiling_holds
from fx_sparsity.masks.bits import pack_bits
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.storage import CompressedFile, FileFormatError, faults
from tests.storage.test_formats import same_bits

HALF = fxs.SparsityMapping().set_global("unstructured 50%")


def tensors_of_a_model(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": randn(96, 32)}
    for i in range(3):
        prefix = f"model.layers.{i}"
        tensors |= {
            f"{prefix}.attn.q_proj.weight": randn(32, 32),
            f"{prefix}.mlp.down.weight": randn(32, 64),
            f"{prefix}.mlp.experts": randn(4, 32, 64),
            f"{prefix}.norm.weight": randn(33),
        }
    return tensors | {"lm_head.weight": randn(96, 32).float(), "conv.weight": randn(8, 4, 3, 3)}


def write_checkpoint(folder, tensors, shards=3):
    """As transformers writes them."""
    folder.mkdir(parents=True)
    names = list(tensors)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "extra").mkdir()
    (folder / "pytorch_model.bin").touch()
    (folder / "extra" / "tokens.txt").write_text("a b c")


def read_all(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture
def source(tmp_path):
    tensors = tensors_of_a_model()
    write_checkpoint(tmp_path / "src", tensors)
    return tmp_path / "src", tensors


def test_a_sharded_checkpoint_is_masked_as_its_weights_would_be(source, tmp_path, caplog):
    src, tensors = source
    mapping = (
        fxs.SparsityMapping()
        .set_global("2:4")
        .set_object_type("embedding", "rows 25%")
        .set_object_type("conv", None)
        .set_module_name("lm_head", "block:4x4 50%")
    )
    with caplog.at_level(logging.INFO):
        report = fxs.sparsify_checkpoint(src, tmp_path / "dst", mapping)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert f"({total} of {total})" in caplog.messages[-1]
    result = read_all(tmp_path / "dst")
    assert result.keys() == tensors.keys()
    reference = fxs.DataNormSparsifier()
    for name, tensor in tensors.items():
        row = report.get(name)
        if row is None or row.pattern is None:
            assert same_bits(result[name], tensor)
            continue
        config = SparsityConfig.parse(row.pattern)
        expected = tensor.clone()
        reference.add_data(
            name, expected, pattern=config.pattern, sparsity_level=config.level, roles=row.roles
        )
    reference.step()
    for name in reference.names:
        assert same_bits(result[name], reference.get_data(name, return_original=False))
        assert report[name].zeros == int((result[name] == 0).sum())
    assert report["conv.weight"].reason == "excluded by type 'conv'"
    assert "3 axes" in report["model.layers.0.mlp.experts"].reason
    assert report["model.embed_tokens.weight"].roles == ("row", "dim")


def test_the_folder_around_it_is_right(source, tmp_path):
    src, tensors = source
    dst = tmp_path / "dst"
    fxs.sparsify_checkpoint(src, dst, HALF)
    assert sorted(p.name for p in dst.rglob("*")) == sorted(
        [
            *(p.name for p in src.rglob("*") if p.suffix != ".bin"),
            "sparsity.json",
            "sparsity.record",
        ]
    )
    for name in ("config.json", "extra/tokens.txt", "model.safetensors.index.json"):
        assert json_or_text(dst / name) == json_or_text(src / name)
    for shard in src.glob("*.safetensors"):
        with safe_open(dst / shard.name, "pt") as file, safe_open(shard, "pt") as original:
            assert set(file.keys()) == set(original.keys())
            assert file.metadata() == original.metadata()
    weights = json.loads((dst / "sparsity.json").read_text())["weights"]
    assert weights["lm_head.weight"]["pattern"] == "unstructured 50%"
    assert weights["lm_head.weight"]["zeros"] == 96 * 16


def json_or_text(path):
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else text


@pytest.mark.parametrize("ties", [False, True])
def test_one_level_over_the_whole_model(ties, tmp_path):
    tensors = tensors_of_a_model()
    if ties:
        tensors = {name: (2 * tensor).round() / 2 for name, tensor in tensors.items()}
    write_checkpoint(tmp_path / "src", tensors)
    report = fxs.sparsify_checkpoint(tmp_path / "src", tmp_path / "dst", HALF, ranked="model")
    names = [name for name, weight in report.items() if weight.pattern is not None]
    masks = global_masks([tensors[name] for name in names], 0.5, Rank.MAGNITUDE)
    result = read_all(tmp_path / "dst")
    for name, mask in zip(names, masks, strict=True):
        assert same_bits(result[name], tensors[name].masked_fill(~mask, 0))


def test_one_level_needs_one_level(source, tmp_path):
    src, _ = source
    mapping = fxs.SparsityMapping().set_global("unstructured 50%").set_module_name("lm_head", "2:4")
    with pytest.raises(CheckpointError, match='lm_head.weight: ranked="model" needs one level'):
        fxs.sparsify_checkpoint(src, tmp_path / "dst", mapping, ranked="model")
    assert not (tmp_path / "dst").exists()


def test_roles_may_be_given(source):
    src, _ = source
    weights = find_checkpoint_weights(
        Checkpoint(src), {r".*experts$": ("batch", "in", "out"), r".*down": ("in", "out")}
    )
    assert weights["model.layers.1.mlp.experts"].roles == ("batch", "in", "out")
    assert weights["model.layers.1.mlp.down.weight"].roles == ("in", "out")
    with pytest.raises(CheckpointError, match="experts: expected 3 roles, found in, out"):
        find_checkpoint_weights(Checkpoint(src), {r".*experts": ("in", "out")})


def test_a_criterion_of_ones_own(source, tmp_path):
    class Last(fxs.BaseDataSparsifier):
        def update_mask(self, name, data, pattern=None, **config):
            self.get_mask(name)[-1] = 0

    src, tensors = source
    report = fxs.sparsify_checkpoint(src, tmp_path / "dst", HALF, Last())
    result = read_all(tmp_path / "dst")
    for name, weight in report.items():
        if weight.pattern is not None:
            assert not result[name][-1].any()
            assert torch.equal(result[name][:-1], tensors[name][:-1])


def test_every_layout_reads_back_the_same(source, tmp_path):
    src, _ = source
    mapping = fxs.SparsityMapping().set_global("2:4").set_module_name("conv", None)
    fxs.sparsify_checkpoint(src, tmp_path / "dense", mapping)
    expected = read_all(tmp_path / "dense")
    before = tmp_path / "dense"
    for layout in ("compressed", "sparse-24-bitmask", "sparse-bitmask", "compressed", "dense"):
        after = tmp_path / f"{before.name}-{layout}"
        convert(before, after, layout)
        loaded = {
            name: tensor
            for path in sorted(after.glob("*.safetensors"))
            for name, tensor in fxs.load(path).items()
        }
        assert loaded.keys() == expected.keys()
        assert all(same_bits(loaded[name], expected[name]) for name in expected)
        index = json.loads((after / "model.safetensors.index.json").read_text())
        held = {k: p.name for p in after.glob("*.safetensors") for k in load_file(p)}
        assert index["weight_map"] == held
        total = sum(t.nbytes for p in after.glob("*.safetensors") for t in load_file(p).values())
        assert index["metadata"]["total_size"] == total
        config = json.loads((after / "config.json").read_text())
        assert config["model_type"] == "toy"
        if layout.startswith("sparse"):
            sparsity = config["quantization_config"]["sparsity_config"]
            assert sparsity["format"] == layout
            assert "model.layers.0.mlp.down" in sparsity["targets"]
            assert sparsity["global_sparsity"] == pytest.approx(0.5, abs=0.01)
        before = after


def test_single_files_convert_to_files(tmp_path):
    weight = torch.eye(64)
    fxs.save({"w.weight": weight}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "dense")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["w.weight"], weight)
    fxs.sparsify_checkpoint(tmp_path / "b.safetensors", tmp_path / "c.safetensors", HALF)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{x}.safetensors" for x in "abc"]


# -- what cannot be done ---------------------------------------------------------------------------


def test_places_that_cannot_be_used(source, tmp_path):
    src, _ = source
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    places = (
        (src, "is the source, or lies in it"),
        (src / "sparse", "is the source, or lies in it"),
        (tmp_path / "full", "is there already; remove it"),
    )
    for place, message in places:
        with pytest.raises(CheckpointError, match=message):
            fxs.sparsify_checkpoint(src, place, HALF)
    with pytest.raises(FileNotFoundError, match="expected safetensors files, found none"):
        fxs.sparsify_checkpoint(tmp_path / "full", tmp_path / "dst", HALF)
    with pytest.raises(MappingError, match="no weight or owning module 'head'"):
        fxs.sparsify_checkpoint(
            src, tmp_path / "dst", fxs.SparsityMapping().set_module_name("head", "2:4")
        )
    assert not (tmp_path / "dst").exists()
    fxs.sparsify_checkpoint(src, tmp_path / "empty", HALF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("lm_head.weight"), "lm_head.weight: .* says it is in None"),
        (lambda m: m.update(ghost="model-00001-of-00003.safetensors"), "ghost: .*in no file"),
        (lambda m: m.update(ghost="../x.safetensors"), "in this directory"),
        (lambda m: m.update(ghost="x.safetensors"), "x.safetensors, which model.safetensors.index"),
        (lambda m: m.update(ghost=3), "in this directory"),
    ],
)
def test_an_index_that_lies(source, change, message):
    src, _ = source
    path = src / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises((CheckpointError, FileFormatError, FileNotFoundError), match=message):
        Checkpoint(src)


def test_nan_is_named(source, tmp_path):
    src, tensors = source
    tensors["lm_head.weight"][3, 3] = float("nan")
    write_checkpoint(tmp_path / "nan", tensors)
    with pytest.raises(ValueError, match="lm_head.weight"):
        fxs.sparsify_checkpoint(tmp_path / "nan", tmp_path / "dst", HALF)


# -- what it says of itself ------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "ranked"), [("2:4", "weight"), ("unstructured 5%", "model")])
def test_the_record_and_the_stated_patterns_are_those_of_the_files(tmp_path, pattern, ranked):
    """Zeros that are kept, of both signs, and masks that end within a byte."""
    tensors = tensors_of_a_model() | {"odd.weight": torch.randn(3, 28)}
    tensors["lm_head.weight"][:48] = 0
    tensors["lm_head.weight"][:8] = -0.0
    write_checkpoint(tmp_path / "src", tensors)
    mapping = {"global": pattern, "object_type": {"conv": None}}
    report = fxs.sparsify_checkpoint(tmp_path / "src", tmp_path / "dst", mapping, ranked=ranked)
    result = read_all(tmp_path / "dst")
    record = fxs.SparsityRecord.load(tmp_path / "dst" / "sparsity.record")
    assert sorted(record) == sorted(n for n, w in report.items() if w.pattern is not None)
    for name, mask in record.items():
        assert not result[name][~mask.keep].any()
        assert torch.equal(mask.kept_zeros, (result[name] == 0) & mask.keep)
        assert report[name].zeros == int((result[name] == 0).sum())
        assert torch.equal(mask.packed, pack_bits(mask.keep))
        assert (mask.shape, mask.roles) == (result[name].shape, report[name].roles)
    assert record["lm_head.weight"].kept_zeros.any()
    stated, roles = stated_patterns(Checkpoint(tmp_path / "dst"))
    assert stated.keys() == roles.keys() == record.keys()
    for name, config in stated.items():
        tiling = config.pattern.tiling(result[name].shape, roles[name])
        assert tiling_holds(result[name] == 0, tiling, config.level)
    module = nn.Module()
    for name in record:
        owner, _, attribute = name.rpartition(".")
        holder = nn.Module()
        holder.register_parameter(attribute, nn.Parameter(result[name]))
        parent = module
        for part in owner.split(".")[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(owner.rpartition(".")[2], holder)
    fxs.verify(module, record).raise_if_lost()


def test_a_record_goes_from_layout_to_layout(source, tmp_path):
    src, _ = source
    fxs.sparsify_checkpoint(src, tmp_path / "dense", HALF)
    convert(tmp_path / "dense", tmp_path / "small", "compressed")
    again = fxs.SparsityMapping().set_module_name("lm_head", "unstructured 75%")
    fxs.sparsify_checkpoint(tmp_path / "small", tmp_path / "again", again)
    for name in ("sparsity.json", "sparsity.record"):
        contents = [(tmp_path / f / name).read_bytes() for f in ("dense", "small", "again")]
        assert contents[0] == contents[1] != contents[2]
    assert [*fxs.SparsityRecord.load(tmp_path / "again" / "sparsity.record")] == ["lm_head.weight"]


def test_a_tied_weight_is_stated_once(tmp_path):
    weight = torch.randn(16, 8)
    (tmp_path / "src").mkdir()
    fxs.save({"embed.weight": weight, "head.weight": weight}, tmp_path / "src" / "a.safetensors")
    mapping = fxs.SparsityMapping().set_module_name("head", "2:4")
    report = fxs.sparsify_checkpoint(
        tmp_path / "src", tmp_path / "dst", mapping, layout="compressed"
    )
    assert [(row.fqn, row.zeros) for row in report.rows] == [("embed.weight", 64)]
    record = fxs.SparsityRecord.load(tmp_path / "dst" / "sparsity.record")
    assert record["embed.weight"].aliases == ("head.weight",)


# -- interruptions ---------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_repeats_nothing(source, tmp_path, monkeypatch):
    src, _ = source
    read = CompressedFile.read

    def stop(self, name, room=None):
        if room is not None and name == "model.layers.2.mlp.experts":  # the last of shard 2
            raise KeyboardInterrupt
        return read(self, name, room)

    for ranked in ("weight", "model"):
        dst, partial = tmp_path / ranked, tmp_path / f"{ranked}.partial"
        monkeypatch.setattr(CompressedFile, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            fxs.sparsify_checkpoint(src, dst, HALF, ranked=ranked)
        monkeypatch.undo()
        assert not dst.exists()
        written = (partial / "model-00001-of-00003.safetensors").stat().st_mtime_ns
        other = fxs.SparsityMapping().set_global("unstructured 60%")
        different = "begun otherwise: weights .* 'unstructured 50%' there, now 'unstructured 60%'"
        with pytest.raises(CheckpointError, match=different):
            fxs.sparsify_checkpoint(src, dst, other, ranked=ranked)
        with pytest.raises(CheckpointError, match="verb 'sparsifying' there, now 'converting'"):
            convert(src, dst)
        (partial / ".model-00002-of-00003.safetensors.abc.part").touch()  # of a kill
        report = fxs.sparsify_checkpoint(src, dst, HALF, ranked=ranked)
        assert (dst / "model-00001-of-00003.safetensors").stat().st_mtime_ns == written
        assert not partial.exists()
        whole = tmp_path / f"{ranked}-whole"
        assert fxs.sparsify_checkpoint(src, whole, HALF, ranked=ranked) == report
        assert {p.name: p.read_bytes() for p in dst.iterdir() if p.is_file()} == {
            p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()
        }


KILLED = """
import sys, fx_sparsity as fxs
print("go", flush=True)
src, dst = sys.argv[1:]
fxs.sparsify_checkpoint(src, dst, fxs.SparsityMapping().set_global("unstructured 50%"))
"""


@pytest.mark.exhaustive
def test_kills_of_a_real_process_lose_nothing(tmp_path):
    tensors = {f"layer{i}.weight": torch.randn(1024, 2048) for i in range(40)}
    write_checkpoint(tmp_path / "src", tensors, shards=20)
    generator = torch.Generator().manual_seed(0)
    whole, dst, killed, done = tmp_path / "whole", tmp_path / "dst", 0, set()
    partial = tmp_path / "dst.partial"
    fxs.sparsify_checkpoint(tmp_path / "src", whole, HALF)

    def compare():
        files = {p.name for p in whole.iterdir() if p.is_file()}
        assert {p.name for p in dst.iterdir() if p.is_file()} == files
        assert all((whole / name).read_bytes() == (dst / name).read_bytes() for name in files)

    while killed < 50:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "src"), str(dst)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.15 * torch.rand((), generator=generator).item())
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL)
        killed += process.returncode != 0
        process.stdout.close()
        if dst.exists():
            (dst / ".run.json").unlink(missing_ok=True)  # killed just before
            compare()  # it came to its end
            shutil.rmtree(dst)
            done = set()
            continue
        log = partial / ".run.json"
        noted = json.loads(log.read_text())["done"]["shards"] if log.exists() else {}
        now = {(name, (partial / name).stat().st_mtime_ns) for name in noted}
        assert done <= now  # what was finished is there, and was not written again
        done = now
    fxs.sparsify_checkpoint(tmp_path / "src", dst, HALF)
    compare()


# -- memory ----------------------------------------------------------------------------------------


LIMITED = """
import resource, sys, time
from pathlib import Path
import torch, fx_sparsity as fxs
from fx_sparsity._native import MASKS

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

MASKS.ready()
torch.randn(1000, 1000).masked_fill_(torch.ones(1000, 1000, dtype=torch.bool), 0)
resident = status("VmRSS")
src, dst, layout, ranked, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
Path("/proc/self/clear_refs").write_text("5")
started = time.time()
mapping = fxs.SparsityMapping().set_global("unstructured 50%")
fxs.sparsify_checkpoint(src, dst, mapping, layout=layout, ranked=ranked)
print(status("VmHWM") - resident, time.time() - started)
"""


def in_limited_memory(src, dst, layout="dense", ranked="weight", limit=0):
    """Peak of memory, and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(src), str(dst), layout, ranked, str(limit)],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, seconds = map(float, done.stdout.split())
    return peak, seconds


@pytest.mark.parametrize("layout", ["dense", "compressed"])
def test_memory_holds_no_more_than_three_of_the_largest_tensors(layout, tmp_path):
    largest = 64 << 20
    tensors = {f"l{i}.weight": torch.randn(4096, 8192).bfloat16() for i in range(4)}
    write_checkpoint(tmp_path / "src", tensors, shards=2)
    del tensors
    most = 3 * largest + (24 << 20)  # code that is loaded on the way
    # Pages of mapped files count until the kernel takes them back, which it does when it likes.
    runs = (in_limited_memory(tmp_path / "src", tmp_path / f"dst{i}", layout)[0] for i in range(6))
    assert any(peak <= most for peak in runs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranked", ["weight", "model"])
def test_eight_gigabytes_in_two(ranked, tmp_path):
    """Under a limit of 2 GB for everything that the process allocates, torch's own included."""
    gigabyte = 1 << 30
    src = tmp_path / "src"
    src.mkdir()
    where = {}
    weight = torch.randn(8192, 8192).bfloat16()
    for shard in range(8):
        file = f"model-{shard + 1:05}-of-00008.safetensors"
        names = [f"model.layers.{8 * shard + i}.mlp.weight" for i in range(8)]
        save_file({name: weight + i for i, name in enumerate(names)}, src / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 8 * gigabyte}, "weight_map": where}
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()
    started = time.time()
    subprocess.run(["cp", "-r", str(src), str(tmp_path / "copy")], check=True)
    os.sync()  # as ours are
    copying = time.time() - started
    subprocess.run(["rm", "-r", str(tmp_path / "copy")], check=True)
    os.sync()
    peak, seconds = in_limited_memory(src, tmp_path / "dst", ranked=ranked, limit=2 * gigabyte)
    print(f"copying {copying:.1f} s, ours {seconds:.1f} s, peak {peak / (1 << 20):.0f} MiB")
    assert peak <= 3 * weight.nbytes + (32 << 20)
    assert sum(p.stat().st_size for p in (tmp_path / "dst").glob("*.safetensors")) > 8 * gigabyte
    for path in (tmp_path / "dst").glob("*.safetensors"):
        assert faults(path) == []
    for path in Path(tmp_path).rglob("*.safetensors"):
        path.unlink()  # pytest keeps folders for a while
