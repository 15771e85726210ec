import json

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from fx_sparsity import SparsityConfig, SparsityMapping, WeightNormSparsifier, find_weights, prepare
from fx_sparsity.graph import MappingError
from fx_sparsity.patterns import PatternError
from tests.models import make


@pytest.fixture
def weights():
    return find_weights(*make("recommender"))


def test_the_most_specific_entry_wins(weights):
    mapping = (
        SparsityMapping()
        .set_global("unstructured 50%")
        .set_object_type(nn.Linear, "2:4")
        .set_module_name_regex(r"tables\.", "rows 25%")
        .set_module_name("tables.1", None)
        .set_module_name("top.2.weight", SparsityConfig("block:2x4", 0.5))
    )
    assert_expected_inline(
        str(mapping.resolve(weights)),
        """\
weight           sparsity
---------------  ----------------------------------
bottom.0.weight  2:4
bottom.2.weight  2:4
tables.0.weight  rows 25%
tables.2.weight  rows 25%
top.0.weight     2:4
top.2.weight     block:2x4 50%
tables.1.weight  dense: excluded by name 'tables.1'""",
    )


def test_kinds_of_the_map_are_types_too(weights):
    assignment = SparsityMapping().set_object_type("embedding_bag", "2:4").resolve(weights)
    assert list(assignment) == ["tables.0.weight", "tables.1.weight", "tables.2.weight"]
    assert set(assignment.dense) == set(weights) - set(assignment)


def test_a_tied_weight_answers_to_each_of_its_names():
    weights = find_weights(*make("tied"))
    assignment = SparsityMapping().set_module_name("head.weight", "2:4").resolve(weights)
    assert list(assignment) == ["embed.weight"]


def test_unknown_names_give_the_nearest(weights):
    with pytest.raises(MappingError, match=r"'botom.0'; the nearest are 'bottom.0'"):
        SparsityMapping().set_module_name("botom.0", "2:4").resolve(weights)


def test_what_is_no_weight_says_why():
    model, inputs = make("bare")
    weights = find_weights(model, inputs)
    with pytest.raises(MappingError, match="'position' is not a weight.*only added"):
        SparsityMapping().set_module_name("position", "2:4").resolve(weights)
    model.register_parameter("codes", nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), False))
    with pytest.raises(MappingError, match="'codes' is not a weight.*not floating"):
        SparsityMapping().set_module_name("codes", "2:4").resolve(find_weights(model, inputs))


def test_every_weight_that_cannot_take_its_pattern_is_named():
    weights = find_weights(*make("convnet"))
    with pytest.raises(MappingError) as raised:
        SparsityMapping().set_global("4:8").resolve(weights)
    message = str(raised.value)
    assert message.splitlines()[0].startswith("stem.weight: pattern 4:8 needs dimension 1")
    assert "grouped.weight" in message
    assert "up.weight" not in message


def test_only_configurations_are_taken():
    with pytest.raises(TypeError, match="found float"):
        SparsityMapping().set_global(0.5)


def full_mapping():
    return (
        SparsityMapping()
        .set_global("unstructured 50%")
        .set_object_type(nn.Linear, "2:4 dense")
        .set_object_type("conv", "block:2x4:3 25%")
        .set_module_name_regex(r"tables\.", "rows 12.5%")
        .set_module_name("tables.1", None)
    )


def test_a_mapping_survives_being_written_down(weights):
    data = full_mapping().to_dict()
    assert json.loads(json.dumps(data)) == data
    read = SparsityMapping.from_dict(json.loads(json.dumps(data)))
    assert read.to_dict() == data
    assert read.resolve(weights) == full_mapping().resolve(weights)
    assert_expected_inline(
        json.dumps(data, indent=1),
        """\
{
 "global": "unstructured 50%",
 "object_type": {
  "torch.nn.modules.linear.Linear": "2:4 dense",
  "conv": "block:2x4:3 25%"
 },
 "module_name_regex": {
  "tables\\\\.": "rows 12.5%"
 },
 "module_name": {
  "tables.1": null
 }
}""",
    )


def test_parts_of_a_dict_may_be_left_out_but_not_misspelt(weights):
    assert len(SparsityMapping.from_dict({}).resolve(weights)) == 0
    assert len(SparsityMapping.from_dict({"global": "2:4"}).resolve(weights)) == len(weights)
    with pytest.raises(MappingError, match="unknown key 'module_names'; expected global"):
        SparsityMapping.from_dict({"module_names": {}})
    with pytest.raises(PatternError, match="'3:2:1'"):
        SparsityMapping.from_dict({"module_name": {"top.0": "3:2:1"}})


def test_a_rule_decides_for_the_rest(weights):
    def rule(site):
        return "2:4" if site.kind == "linear" and site.shape[0] > 8 else None

    mapping = SparsityMapping().set_rule(rule).set_module_name("top.0", "rows 50%")
    assignment = mapping.resolve(weights)
    assert {fqn: str(config) for fqn, config in assignment.items()} == {
        "bottom.0.weight": "2:4",
        "top.0.weight": "rows 50%",
    }
    assert set(assignment.dense.values()) == {"excluded by the rule"}
    with pytest.raises(MappingError, match="cannot be written down"):
        mapping.to_dict()
    assert len(mapping.set_global("2:4").resolve(weights)) == len(weights)
    with pytest.raises(TypeError, match="found str"):
        SparsityMapping().set_rule("2:4")


def test_a_weights_own_name_beats_its_modules():
    mapping = (
        SparsityMapping().set_module_name("top.0", "2:4").set_module_name("top.0.weight", None)
    )
    assignment = mapping.resolve(find_weights(*make("recommender")))
    assert assignment.dense["top.0.weight"] == "excluded by name 'top.0.weight'"


def test_types_match_while_masks_are_on():
    model, inputs = make("sequential")
    mapping = SparsityMapping().set_object_type(nn.Linear, "2:4")
    prepare(model, WeightNormSparsifier(), inputs, mapping)
    assert list(mapping.resolve(find_weights(model, inputs))) == ["0.weight", "2.weight"]


def test_a_single_row_keeps_its_role_through_a_transpose():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 16))

        def forward(self, x):
            return x @ self.weight.t()

    (site,) = find_weights(Single(), (torch.randn(2, 16),)).sites
    assert site.roles == ("out", "in")


def test_entries_that_match_nothing_are_listed_and_logged(caplog):
    model, inputs = make("recommender")
    mapping = (
        SparsityMapping()
        .set_object_type(nn.Conv2d, "2:4")
        .set_object_type("linear", None)  # matches, though a regex goes before it
        .set_module_name_regex("top|bottom", "2:4")
        .set_module_name_regex("botom", "2:4")
    )
    assignment = mapping.resolve(find_weights(model, inputs))
    assert assignment.unmatched == ("regex 'botom'", "type 'torch.nn.modules.conv.Conv2d'")
    assert str(assignment).splitlines()[-2] == "no weight matches regex 'botom'"
    prepare(model, WeightNormSparsifier(), inputs, mapping)
    logged = [r.getMessage() for r in caplog.records if r.name == "fx_sparsity.graph.prepare"]
    assert logged[0] == "no weight matches regex 'botom' of the mapping"
    assert len(logged) == 2
