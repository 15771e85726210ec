"""Which files of a folder are a checkpoint, and its tensors in memory maps."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fx_sparsity.checkpoints import Checkpoint, CheckpointError, MappedCheckpoint, convert
from fx_sparsity.storage import FileFormatError


def shards(root, index=True):
    one, two = {"a": torch.randn(3), "b": torch.randn(2, 2)}, {"c": torch.randn(4)}
    save_file(one, root / "m-1.safetensors")
    save_file(two, root / "m-2.safetensors")
    if index:
        places = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
        (root / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return {**one, **two}


@pytest.mark.parametrize("index", [True, False])
def test_a_checkpoint_is_all_of_its_shards(tmp_path, index):
    tensors = shards(tmp_path, index)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("{}")
    (tmp_path / "original" / "consolidated.pth").write_text("")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shards == ["m-1.safetensors", "m-2.safetensors"]
    assert checkpoint.index == ("m.safetensors.index.json" if index else None)
    assert checkpoint.others == ["config.json", "original/params.json"]
    assert checkpoint.skipped == ["original/consolidated.pth", "pytorch_model.bin"]
    held = MappedCheckpoint(checkpoint)
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())


def test_what_an_index_does_not_name_is_ignored(tmp_path):
    shards(tmp_path)
    save_file({"a": torch.zeros(9)}, tmp_path / "consolidated.safetensors")
    assert Checkpoint(tmp_path).skipped == ["consolidated.safetensors"]
    assert Checkpoint(tmp_path / "m-2.safetensors").shards == ["m-2.safetensors"]


def test_linked_folders_are_not_followed_and_linked_files_are_read(tmp_path):
    """As the cache of the hub lays out a snapshot, and with links that lead elsewhere."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    for place in (blobs, folder / "sub", tmp_path / "private", folder / "twin"):
        place.mkdir(parents=True)
    tensors = shards(blobs)
    (tmp_path / "private" / "key.txt").write_text("secret")
    for number, name in enumerate(sorted(path.name for path in blobs.iterdir())):
        (blobs / name).rename(blobs / str(number))
        (folder / name).symlink_to(f"../../blobs/{number}")
    (folder / "sub" / "config.json").symlink_to("../../../blobs/2")
    (folder / "gone.json").symlink_to("../../blobs/none")
    for link in ("linked", "sub/linked"):
        (folder / link).symlink_to(tmp_path / "private", target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    checkpoint = Checkpoint(folder)
    assert checkpoint.skipped == ["gone.json", "linked", "loop", "sub/linked"]
    assert checkpoint.others == ["sub/config.json"]
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    convert(folder, tmp_path / "out")
    assert "key.txt" not in {path.name for path in (tmp_path / "out").rglob("*")}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    Checkpoint(tmp_path / "out")


def test_checkpoints_of_unknown_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected safetensors files, found none"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "nowhere")
    shards(tmp_path, index=False)
    save_file({"c": torch.zeros(9)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"c: in m-2.safetensors and in other.safetensors"):
        MappedCheckpoint(Checkpoint(tmp_path))
    index = tmp_path / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "m-3.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"m-3.safetensors, which m.safetensors.index.json"):
        Checkpoint(tmp_path)
    index.write_text('{"weight_map": {"a": "../m.safetensors"}}')
    with pytest.raises(FileFormatError, match="name -> file in this directory"):
        Checkpoint(tmp_path)
    (tmp_path / "n.safetensors.index.json").write_text("{}")
    with pytest.raises(FileFormatError, match="expected one index"):
        Checkpoint(tmp_path)
