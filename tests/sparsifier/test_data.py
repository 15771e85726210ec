import pytest
import torch
from torch import nn

from fx_sparsity import BaseDataSparsifier, DataNormSparsifier
from fx_sparsity.patterns import PatternError
from fx_sparsity.sparsifier import MaskError


class FirstRow(BaseDataSparsifier):
    """Prunes row 0."""

    def update_mask(self, name, data, **config):
        self.get_mask(name)[0] = 0


def test_every_kind_of_data_is_held_not_copied():
    tensor, parameter = torch.randn(3, 4), nn.Parameter(torch.randn(3, 4))
    embedding, bag = nn.Embedding(3, 4), nn.EmbeddingBag(3, 4)
    sparsifier = FirstRow([("a.b", tensor), ("a_b", parameter), ("e", embedding), ("g", bag)])
    for name, weight in zip(
        sparsifier.names, (tensor, parameter, embedding.weight, bag.weight), strict=True
    ):
        assert sparsifier.get_data(name) is weight
    sparsifier.step()
    tensor.fill_(7)
    parameter.data = torch.full((3, 4), 5.0)
    assert sparsifier.get_data("a.b", return_original=False).sum() == 7 * 8
    assert sparsifier.get_data("a_b", return_original=False).sum() == 5 * 8


def test_config_overrides_defaults_by_name():
    sparsifier = DataNormSparsifier([("a", torch.randn(4, 4))], sparsity_level=0.25)
    sparsifier.add_data("b", torch.randn(4, 4), sparsity_level=0.75)
    sparsifier.step()
    assert sparsifier.data_groups["a"]["sparsity_level"] == 0.25
    assert sparsifier.get_mask("a").mean() == 0.75
    assert sparsifier.get_mask("b").mean() == 0.25


def test_replacing_keeps_mask_and_config():
    sparsifier = DataNormSparsifier([("a", torch.randn(4, 4))])
    sparsifier.add_data("b", torch.randn(4, 4), sparsity_level=0.75)
    sparsifier.step()
    mask = sparsifier.get_mask("b").clone()
    with pytest.warns(UserWarning, match="replacing existing data of the name 'b'"):
        sparsifier.add_data("b", torch.randn(4, 4))
    assert torch.equal(sparsifier.get_mask("b"), mask)
    assert sparsifier.data_groups["b"]["sparsity_level"] == 0.75
    with pytest.warns(UserWarning, match="replacing"):
        sparsifier.add_data("b", torch.randn(2, 8), reuse_mask=False)
    assert sparsifier.get_mask("b").eq(1).all()


def test_a_refused_replacement_changes_nothing():
    tensor = torch.randn(4, 4)
    sparsifier = DataNormSparsifier([("a", tensor)])
    sparsifier.step()
    mask = sparsifier.get_mask("a").clone()
    with pytest.raises(MaskError, match=r"a: to retain the old mask.*expected \(4, 4\)"):
        sparsifier.add_data("a", torch.randn(2, 2))
    with pytest.raises(TypeError, match="found str"):
        sparsifier.add_data("a", "no tensor")
    with pytest.raises(MaskError, match="int64"):
        sparsifier.add_data("b", torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(PatternError, match="zeros_per_block must lie in 0..4"):
        sparsifier.add_data("b", torch.randn(2, 2), zeros_per_block=5)
    assert sparsifier.names == ["a"]
    assert sparsifier.get_data("a") is tensor
    assert torch.equal(sparsifier.get_mask("a"), mask)


def test_squashing_some_or_all():
    first, second = torch.randn(4, 4), torch.randn(4, 4)
    sparsifier = DataNormSparsifier([("a", first), ("b", second)])
    sparsifier.step()
    with pytest.raises(ValueError, match="does not exist"):
        sparsifier.squash_mask(names=["a", "c"])
    assert first.ne(0).all()
    sparsifier.squash_mask(names=["a"])
    assert first.eq(0).sum() == 8
    with pytest.raises(ValueError, match="squashed"):
        sparsifier.get_data("a")
    sparsifier.squash_mask(names=["b"], leave_parametrized=False)
    assert second.ne(0).all()
    sparsifier.step()
    assert torch.equal(sparsifier.get_data("a", return_original=False), first)


def test_levels_are_clamped_as_they_always_were():
    sparsifier = DataNormSparsifier([("none", torch.randn(4, 4))], sparsity_level=-1)
    sparsifier.add_data("all", torch.randn(4, 4), sparsity_level=2)
    sparsifier.step()
    assert sparsifier.get_mask("none").eq(1).all()
    assert sparsifier.get_mask("all").eq(0).all()


def test_level_one_with_two_zeros_in_four_is_two_of_four():
    data = torch.randn(16, 32)
    sparsifier = DataNormSparsifier([("a", data)], sparsity_level=1.0, zeros_per_block=2)
    sparsifier.step()
    mask = sparsifier.get_mask("a")
    assert mask.view(-1, 4).sum(1).eq(2).all()
    largest = data.abs().view(-1, 4).topk(2).indices
    assert mask.view(-1, 4).gather(1, largest).eq(1).all()


def test_unknown_keywords_raise_in_concrete_classes_only():
    with pytest.raises(TypeError, match="sparsity_levle"):
        DataNormSparsifier(sparsity_levle=0.5)
    assert FirstRow(anything=1).defaults == {"anything": 1}
