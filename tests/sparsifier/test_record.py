import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import fx_sparsity as fxs
from fx_sparsity import SparsityRecord, WeightNormSparsifier, save
from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.sparsifier import take_over_pruned
from fx_sparsity.sparsifier.record import RecordError, record_metadata
from fx_sparsity.storage import SafetensorsFile
from tests.models import make


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**31))
def test_bits_round_trip(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


def test_the_bit_order_is_low_bit_first():
    assert pack_bits(torch.tensor([True] + [False] * 8 + [True])).tolist() == [1, 2]


def test_a_record_outlives_squashing_and_a_file(tmp_path):
    model, _ = make("recommender")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    sparsifier.step()
    before = SparsityRecord.of(sparsifier)
    sparsifier.squash_mask()
    after = SparsityRecord.of(sparsifier)
    before.save(tmp_path / "record.safetensors")
    for record in (after, SparsityRecord.load(tmp_path / "record.safetensors")):
        assert list(record) == sparsifier.names
        for name, mask in record.items():
            assert torch.equal(mask.keep, sparsifier.get_mask(name).bool())
            assert (mask.pattern, mask.level) == ("storage-block:1x4", 0.5)
            assert not mask.kept_zeros.any()
            assert mask.roles == before[name].roles


def test_another_file_is_no_record(tmp_path):
    save({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no sparsity record"):
        SparsityRecord.load(tmp_path / "other.safetensors")


def test_zeros_that_were_there_anyway_are_remembered(tmp_path):
    model, _ = make("root")
    with torch.no_grad():
        model.weight[:, 0] = 0
    sparsifier = WeightNormSparsifier(0.0)
    sparsifier.prepare(model)
    sparsifier.step()
    SparsityRecord.of(sparsifier).save(tmp_path / "record.safetensors")
    mask = SparsityRecord.load(tmp_path / "record.safetensors")["weight"]
    assert torch.equal(mask.kept_zeros, model.weight == 0)


def recorded(path):
    """A record of three weights, one of whose masks ends within a byte, with kept zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Embedding(5, 3), nn.Linear(4, 4))
    model[0].weight.data[:, 0] = 0
    sparsifier = WeightNormSparsifier(0.0)
    sparsifier.prepare(model, [{"tensor_fqn": f"{i}.weight"} for i in range(3)])
    sparsifier.step()
    for name in sparsifier.names:
        sparsifier.get_mask(name)[0, -1] = False
    record = SparsityRecord.of(sparsifier)
    record.save(path)
    return record


def test_any_byte_that_is_changed_is_found(tmp_path):
    path = tmp_path / "record"
    recorded(path)
    content = path.read_bytes()
    for place in range(len(content)):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(RecordError):
                SparsityRecord.load(path)
    for cut in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(RecordError):
            SparsityRecord.load(path)
    path.write_bytes(content + b" ")
    with pytest.raises(RecordError):
        SparsityRecord.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [8, 4, 1]}, "expected roles of"),
        ({"shape": [9, 4]}, "expected a mask of 36 bits"),
        ({"shape": "all"}, "expected a shape"),
        ({"shape": [1, 31]}, "bits behind the last of 31"),
        ({"roles": ["up", "down"]}, "expected roles of"),
        ({"roles": 3}, "expected a list of roles"),
        ({"pattern": "5:4"}, "its pattern '5:4'"),
        ({"pattern": ["2:4"]}, "its pattern"),
        ({"level": 1.5}, r"expected a level in \[0, 1\]"),
        ({"aliases": [1]}, "expected a list of aliases"),
        ({"crc32": 7}, "expected checksum 7"),
        ({"more": 7}, "expected aliases, crc32"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change, message, tmp_path):
    """Though all checksums are right."""
    recorded(tmp_path / "record")
    file = SafetensorsFile(tmp_path / "record")
    masks = {name: file.read(name) for name in file.entries}
    weights = json.loads(file.metadata["sparsity_record"])
    weights["0.weight"] |= change
    metadata = record_metadata(weights)
    save_file(masks, tmp_path / "other", metadata=metadata)
    with pytest.raises(RecordError, match=f"^0.weight: .*{message}"):
        SparsityRecord.load(tmp_path / "other")


def test_a_record_lacks_no_mask(tmp_path):
    recorded(tmp_path / "record")
    file = SafetensorsFile(tmp_path / "record")
    masks = {name: file.read(name) for name in [*file.entries][1:]}
    weights = json.loads(file.metadata["sparsity_record"])
    metadata = record_metadata(weights)
    save_file(masks, tmp_path / "other", metadata=metadata)
    with pytest.raises(RecordError, match="expected two masks for each weight"):
        SparsityRecord.load(tmp_path / "other")


def test_a_record_without_weights_is_one(tmp_path):
    SparsityRecord({}).save(tmp_path / "record")
    assert len(SparsityRecord.load(tmp_path / "record")) == 0


def test_a_schedule_that_is_ahead_of_the_masks():
    """As in the loops of torch.ao.pruning: the schedule steps last, and the masks know nothing of it."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    sparsifier = fxs.WeightNormSparsifier(sparsity_level=0.8, sparse_block_shape=(1, 1))
    fxs.prepare(model, sparsifier, (torch.randn(2, 16),), "unstructured 80%")
    schedule = fxs.LambdaSL(sparsifier, lambda epoch: (epoch + 1) / 4)
    for _ in range(3):
        sparsifier.step()
        schedule.step()
    assert sparsifier.config_of("0.weight")["sparsity_level"] == pytest.approx(0.8)
    restored = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    resumed = fxs.WeightNormSparsifier()
    fxs.prepare(restored, resumed, (torch.randn(2, 16),), "2:4")
    resumed.step()
    resumed.load_state_dict(sparsifier.state_dict())
    unpickled = pickle.loads(pickle.dumps(sparsifier))
    unpickled.attach(dense := nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)))
    copied = copy.deepcopy((model, sparsifier))
    for held, holder in (restored, resumed), (dense, unpickled), copied, (model, sparsifier):
        held, record = fxs.squash(held, holder)
        assert record["0.weight"].level == pytest.approx(0.6)
        fxs.verify(held, record).raise_if_lost()


def test_a_given_mask_stays_one_in_copies():
    """No pattern is claimed for what came from elsewhere."""
    model, sparsifier = nn.Sequential(nn.Linear(16, 16)), fxs.WeightNormSparsifier()
    prune.random_unstructured(model[0], "weight", 0.3)
    take_over_pruned(model, sparsifier)
    model, sparsifier = copy.deepcopy((model, sparsifier))
    model, record = fxs.squash(model, sparsifier)
    assert record["0.weight"].pattern is None
    fxs.verify(model, record).raise_if_lost()
