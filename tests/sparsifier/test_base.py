import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fx_sparsity as fxs
from fx_sparsity import BaseSparsifier, WeightNormSparsifier
from fx_sparsity.masks import ScoreError
from fx_sparsity.patterns import PatternError
from fx_sparsity.sparsifier import MaskError
from tests.models import make


class FirstRow(BaseSparsifier):
    """Prunes row 0, and counts its steps in `state`."""

    def update_mask(self, module, tensor_name, *, tensor_fqn, **config):
        mask = getattr(module.parametrizations, tensor_name)[0].mask
        mask[0] = 0
        self.state[tensor_fqn]["steps"] = self.state[tensor_fqn].get("steps", 0) + 1


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_subclass_edits_masks_in_place_and_keeps_counters():
    model, inputs = make("sequential")
    sparsifier = FirstRow()
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.step()
    assert sparsifier.state["0.weight"]["steps"] == 2
    assert model[0].weight[0].eq(0).all()
    assert sparsifier.state["0.weight"]["mask"] is sparsifier.get_mask("0.weight")
    assert sparsifier.get_mask("0.weight").dtype == torch.float32
    sparsifier.enable_mask_update = False
    sparsifier.step()
    assert sparsifier.state["0.weight"]["steps"] == 2


def test_state_follows_the_model_when_its_buffers_are_replaced():
    model, _ = make("sequential")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    model.half()
    sparsifier.step()
    mask = model[0].parametrizations.weight[0].mask
    assert sparsifier.state["0.weight"]["mask"] is mask
    assert mask.dtype == torch.float16
    assert mask.mean() == 0.5


def test_without_config_every_kind_of_weight_is_found_once():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "embedding": nn.Embedding(4, 4),
            "bag": nn.EmbeddingBag(4, 4),
            "conv": nn.Conv1d(4, 4, 3),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    model["tied"] = nn.Linear(4, 4)
    model["tied"].weight = model["embedding"].weight
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    assert sparsifier.names == [
        "linear.weight",
        "embedding.weight",
        "bag.weight",
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    sparsifier.step()
    assert torch.equal(model["tied"].weight, model["embedding"].weight)
    assert model["tied"].weight.eq(0).float().mean() == 0.5


def test_a_root_module_is_found():
    model, _ = make("root")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    sparsifier.step()
    sparsifier.squash_mask()
    assert type(model).__name__ == "Root"
    assert model.weight.eq(0).float().mean() == 0.5


def test_squashing_bakes_zeros_into_the_same_parameter():
    model, inputs = make("tied")
    parameter = model.embed.weight
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    sparsifier.step()
    masked = model(*inputs)
    sparsifier.squash_mask()
    assert model.embed.weight is parameter
    assert model.head.weight is parameter
    assert not parametrize.is_parametrized(model.head)
    assert torch.equal(model(*inputs), masked)
    before = parameter.clone()
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(parameter, before)


def test_parameters_keep_their_order_through_masking():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2, kdim=8, vdim=8),
            "bilinear": nn.Bilinear(4, 4, 4),
        }
    )
    before = [(name, id(p)) for name, p in model.named_parameters()]
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    assert [(name, id(p)) for name, p in model.named_parameters()] == before


def test_squash_leaves_sparse_params_where_asked():
    model, _ = make("sequential")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    with pytest.raises(KeyError):
        sparsifier.squash_mask(params_to_keep=("nothing",))
    assert parametrize.is_parametrized(model[0])
    sparsifier.squash_mask(
        params_to_keep=("sparsity_level",), params_to_keep_per_layer={"2": ("sparse_block_shape",)}
    )
    assert model[0].sparse_params == {"sparsity_level": 0.5}
    assert model[2].sparse_params == {"sparsity_level": 0.5, "sparse_block_shape": (1, 4)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "0.wieght"}],
            r"no tensor '0.wieght'.*0.weight",
        ),
        (
            [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "0.weight"}],
            "0.weight is the same tensor as",
        ),
        ([{"tensor_fqn": "0.weight"}, {"tensor_fqn": "1"}], "1 is not a tensor"),
        ([{"tensor_fqn": "0.weight"}, {"level": 1}], "a dict with a `tensor_fqn`"),
        (
            [{"tensor_fqn": "0.weight", "mask": torch.ones(2)}],
            r"0.weight: expected a mask of shape",
        ),
    ],
)
def test_a_refused_prepare_changes_nothing(config, message):
    model, _ = make("sequential")
    before = snapshot(model)
    sparsifier = WeightNormSparsifier()
    with pytest.raises(MaskError, match=message):
        sparsifier.prepare(model, config)
    assert_unchanged(model, before)
    assert sparsifier.groups == []
    assert sparsifier.names == []


def test_a_pattern_that_does_not_fit_names_the_weight():
    model, _ = make("recommender")
    before = snapshot(model)
    sparsifier = WeightNormSparsifier()
    config = [{"tensor_fqn": "top.0.weight"}, {"tensor_fqn": "bottom.0.weight", "pattern": "5:8"}]
    with pytest.raises(PatternError, match=r"bottom.0.weight: .*multiple of 8, found 12"):
        sparsifier.prepare(model, config)
    assert_unchanged(model, before)


def test_integer_and_parametrized_tensors_are_refused_by_name():
    model = nn.Linear(4, 4)
    model.register_buffer("codes", torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(MaskError, match="codes has dtype torch.int8"):
        WeightNormSparsifier().prepare(model, [{"tensor_fqn": "codes"}])
    nn.utils.parametrizations.weight_norm(model)
    with pytest.raises(MaskError, match="weight is already parametrized by _WeightNorm"):
        WeightNormSparsifier().prepare(model)


def test_nan_is_named_before_any_mask_changes():
    model, _ = make("sequential")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ScoreError, match=r"2.weight: contains NaN"):
        sparsifier.step()
    after = model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before if n.endswith("mask"))


def test_unknown_norms_and_names_raise():
    with pytest.raises(ValueError, match="norm must be"):
        WeightNormSparsifier(norm="L3")
    with pytest.raises(ValueError, match="does not exist: 'x'"):
        WeightNormSparsifier().get_mask("x")


def test_a_copy_that_is_squashed_leaves_the_original_as_it_is():
    model, sparsifier = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (torch.randn(2, 16),), "2:4")
    sparsifier.step()
    copied, others = copy.deepcopy((model, sparsifier))
    fxs.squash(copied, others)
    x = torch.randn(2, 16)
    assert torch.equal(model(x), copied(x))
    sparsifier.step()
    fxs.squash(model, sparsifier)
    assert torch.equal(model(x), copied(x))


def test_model_and_sparsifier_copied_together_stay_bound():
    model, _ = make("sequential")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    copied_model, copied = copy.deepcopy((model, sparsifier))
    copied.step()
    assert copied_model[0].weight.eq(0).float().mean() == 0.5
    assert model[0].weight.ne(0).all()


def test_repr_lists_groups():
    model, _ = make("root")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    assert "tensor_fqn: weight" in repr(sparsifier)


def test_squashing_would_not_take_other_parametrizations_along():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, _ = make("sequential")
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    parametrize.register_parametrization(model[2], "weight", Double())
    before = snapshot(model)
    with pytest.raises(MaskError, match=r"2.weight is parametrized by Double besides its mask"):
        sparsifier.squash_mask()
    assert_unchanged(model, before)
    tied, _ = make("tied")
    nn.utils.parametrizations.spectral_norm(tied.head)
    tied.embed.weight = tied.head.parametrizations.weight.original
    with pytest.raises(MaskError, match=r"embed.weight is already parametrized by _SpectralNorm"):
        WeightNormSparsifier().prepare(tied, [{"tensor_fqn": "embed.weight"}])


def test_a_bound_sparsifier_refuses_another_model():
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(make("sequential")[0])
    with pytest.raises(MaskError, match="bound to another Sequential"):
        sparsifier.prepare(make("sequential")[0])


def test_uninitialised_memory_does_not_become_a_zero():
    with torch.device("meta"):
        model = nn.Linear(8, 8)
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model)
    model.to_empty(device="cpu")
    source = nn.Linear(8, 8)
    model.load_state_dict(
        {
            "bias": source.bias,
            "parametrizations.weight.original": source.weight,
            "parametrizations.weight.0.mask": torch.zeros(8, 8),
        }
    )
    assert model.weight.eq(0).all()


def test_n_of_m_fixes_its_own_level():
    model = nn.Linear(8, 8)
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": "weight", "pattern": "1:4"}])
    sparsifier.step()
    assert sparsifier.get_mask("weight").view(-1, 4).sum(1).eq(1).all()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sparsity_levl": 0.9}, r"weight: unknown key 'sparsity_levl'.*'sparsity_level'"),
        ({"sparsity_level": "half"}, r"weight: expected a number as sparsity_level, found 'half'"),
    ],
)
def test_typos_are_refused_in_concrete_classes(entry, message):
    model = nn.Linear(8, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        WeightNormSparsifier().prepare(model, [{"tensor_fqn": "weight", **entry}])
    assert not parametrize.is_parametrized(model)


def test_a_model_that_holds_its_sparsifier_copies():
    model, _ = make("sequential")
    model.sparsifier = WeightNormSparsifier()
    model.sparsifier.prepare(model)
    copied = copy.deepcopy(model)
    copied.sparsifier.attach(copied)
    copied.sparsifier.step()
    assert copied[0].weight.eq(0).float().mean() == 0.5
    assert model[0].weight.ne(0).all()


def test_a_weight_norm_takes_masks_but_no_whole_rows():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    name = "0.parametrizations.weight.original1"
    roles = ("out", "in")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        MaskError, match=rf"{name} is combined with other tensors by a parametrization"
    ):
        WeightNormSparsifier().prepare(
            model, [{"tensor_fqn": name, "pattern": "rows", "sparsity_level": 0.5, "roles": roles}]
        )
    assert list(model.state_dict()) == list(before)
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": name, "pattern": "2:4", "roles": roles}])
    sparsifier.step()
    zeros = sparsifier.get_mask(name) == 0
    assert model[0].weight[zeros].eq(0).all()
    sparsifier.squash_mask()
    assert model[0].weight[zeros].eq(0).all()
    assert list(model.state_dict()) == list(before)
