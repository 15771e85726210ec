import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fx_sparsity import SparsityRecord, WeightNormSparsifier, save
from fx_sparsity.masks.bits import pack_bits, unpack_bits
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
