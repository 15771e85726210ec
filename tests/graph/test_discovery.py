import json

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from fx_sparsity import CaptureError, InputError, WeightNormSparsifier, find_weights, prepare
from fx_sparsity.graph import Reason
from tests.models import MODELS, make, make_bert


def test_table_of_a_bert():
    model, inputs = make_bert()
    assert_expected_inline(
        str(find_weights(model, inputs)),
        """\
weight                                         kind       axes             dtype    uses  tied to
---------------------------------------------  ---------  ---------------  -------  ----  -------
embeddings.word_embeddings.weight              embedding  row 64 x dim 32  float32     1
embeddings.token_type_embeddings.weight        embedding  row 2 x dim 32   float32     1
embeddings.position_embeddings.weight          embedding  row 32 x dim 32  float32     1
encoder.layer.0.attention.self.query.weight    linear     out 32 x in 32   float32     1
encoder.layer.0.attention.self.key.weight      linear     out 32 x in 32   float32     1
encoder.layer.0.attention.self.value.weight    linear     out 32 x in 32   float32     1
encoder.layer.0.attention.output.dense.weight  linear     out 32 x in 32   float32     1
encoder.layer.0.intermediate.dense.weight      linear     out 64 x in 32   float32     1
encoder.layer.0.output.dense.weight            linear     out 32 x in 64   float32     1
encoder.layer.1.attention.self.query.weight    linear     out 32 x in 32   float32     1
encoder.layer.1.attention.self.key.weight      linear     out 32 x in 32   float32     1
encoder.layer.1.attention.self.value.weight    linear     out 32 x in 32   float32     1
encoder.layer.1.attention.output.dense.weight  linear     out 32 x in 32   float32     1
encoder.layer.1.intermediate.dense.weight      linear     out 64 x in 32   float32     1
encoder.layer.1.output.dense.weight            linear     out 32 x in 64   float32     1

nothing of two or more dimensions was left out
(22 one-dimensional parameters; read from torch.export)""",
    )


def test_table_of_bare_parameters():
    model, inputs = make("bare")
    assert_expected_inline(
        str(find_weights(model, inputs)),
        """\
weight      kind       axes                    dtype    uses  tied to
----------  ---------  ----------------------  -------  ----  -------
plain       linear     out 16 x in 8           float32     1
transposed  matmul     in 16 x out 8           float32     1
packed      linear     out 24 x in 8           float32     3
experts     matmul     batch 2 x in 8 x out 8  float32     1
heads       einsum     in 8 x out 2 x out 4    float32     1
table       embedding  row 20 x dim 8          float32     1

left out  shape   reason
--------  ------  -------------------------------------------
position  (3, 8)  only added
unused    (4, 4)  does not reach the outputs for these inputs
(1 one-dimensional parameters; read from torch.export)""",
    )


def roles(weights):
    return {site.fqn: (site.kind, site.roles, site.shape) for site in weights.sites}


@pytest.mark.parametrize("name", MODELS)
def test_every_frontend_finds_the_same_weights(name):
    model, inputs = make(name)
    expected = find_weights(model, inputs)
    program = torch.export.export(model, inputs, strict=False)
    assert roles(find_weights(program)) == roles(expected)
    assert roles(find_weights(program.module())) == roles(expected)
    traced = find_weights(fx.symbolic_trace(model))
    # Where a traced graph calls modules, it visits weights in another order.
    assert {k: v[1:] for k, v in roles(traced).items()} == {
        k: v[1:] for k, v in roles(expected).items()
    }
    # A traced GraphModule holds only what its graph reads.
    read = [u.fqn for u in expected.unclaimed if u.reason is not Reason.UNREACHABLE]
    assert [u.fqn for u in traced.unclaimed] == read


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_claimed_or_explained(name):
    model, inputs = make(name)
    weights = find_weights(model, inputs)
    named = {*weights, *(u.fqn for u in weights.unclaimed)}
    named |= {alias for site in weights.sites for alias in site.aliases}
    matrices = {n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    assert named == matrices
    vectors = [p for p in model.parameters() if p.ndim < 2]
    assert weights.vectors == len(vectors)
    assert all(u.reason.explained for u in weights.unclaimed)


def consumers_output(model, inputs, node_name):
    """What one node of the exported graph computes."""
    found = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n):
            found[n.name] = super().run_node(n)
            return found[n.name]

    Recorder(torch.export.export(model, inputs, strict=False).module()).run(*inputs)
    return found[node_name]


@pytest.mark.parametrize("name", ["sequential", "convnet", "tied", "recommender", "bare"])
def test_an_output_axis_moves_that_output_of_its_consumer_and_nothing_else(name):
    model, inputs = make(name)
    with torch.no_grad():
        for site in find_weights(model, inputs).sites:
            use = site.uses[0]
            if "out" not in use.roles or "batch" in use.roles:
                continue
            dim = use.roles.index("out")
            before = consumers_output(model, inputs, use.node)
            parameter = model.get_parameter(site.fqn)
            saved = parameter.clone()
            index = 1 if use.slice is None else use.slice[1] + 1
            parameter.select(dim, index).zero_()
            changed = (consumers_output(model, inputs, use.node) - before).abs()
            parameter.copy_(saved)
            axis = {"conv2d": 1, "conv_transpose2d": 1}.get(use.op, -1)
            if use.op == "einsum":
                axis = 1
            by_channel = changed.movedim(axis, 0).flatten(1).sum(1)
            assert by_channel.ne(0).nonzero().flatten().tolist() == [1], site.fqn


def test_ties_are_one_site():
    model, inputs = make("tied")
    weights = find_weights(model, inputs)
    assert weights["embed.weight"].aliases == ("head.weight",)
    assert [use.op for use in weights["embed.weight"].uses] == ["embedding", "linear"]
    assert "head.weight" not in weights


def test_packed_projections_are_slices_of_one_parameter():
    model, inputs = make("bare")
    packed = find_weights(model, inputs)["packed"]
    assert [use.slice for use in packed.uses] == [(0, 0, 8), (0, 8, 16), (0, 16, 24)]
    assert packed.roles == ("out", "in")


def test_masks_do_not_hide_weights():
    model, inputs = make("convnet")
    expected = roles(find_weights(model, inputs))
    prepare(model, WeightNormSparsifier(), inputs)
    assert roles(find_weights(model, inputs)) == expected


def test_weights_inside_called_modules_that_nobody_opens_are_listed():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 4)

        def forward(self, x):
            return self.rnn(x)[0]

    model = Recurrent()
    weights = find_weights(fx.symbolic_trace(model))
    assert {(u.fqn, u.reason, u.detail) for u in weights.unclaimed} == {
        ("rnn.weight_ih_l0", Reason.FRONTEND, "inside LSTM"),
        ("rnn.weight_hh_l0", Reason.FRONTEND, "inside LSTM"),
    }
    exported = find_weights(model, (torch.randn(3, 2, 4),))
    assert {site.roles for site in exported.sites} == {("out", "in")}
    assert len(exported) == 2


def test_an_operator_without_a_row_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return torch.cdist(x, self.weight)

    (left,) = find_weights(Odd(), (torch.randn(2, 4),)).unclaimed
    assert (left.reason, left.detail) == (Reason.OPERATOR, "cdist")
    assert not left.reason.explained


def test_the_map_serialises():
    model, inputs = make("tied")
    data = json.loads(find_weights(model, inputs).to_json())
    assert data["frontend"] == "torch.export"
    assert data["sites"][0]["roles"] == ["row", "dim"]
    assert data["vectors"] == 1


def test_inputs_that_the_model_rejects():
    model, _ = make("sequential")
    with pytest.raises(InputError, match=r"example_inputs: Sequential rejects them: RuntimeError"):
        find_weights(model, (torch.randn(3, 5),))
    with pytest.raises(InputError, match="found int"):
        find_weights(model, 3)
    with pytest.raises(InputError, match="has to be captured"):
        find_weights(model)


def test_a_model_that_cannot_be_exported():
    class DataDependent(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="runs on example_inputs, but torch.export cannot"):
        find_weights(DataDependent(4, 4), (torch.randn(2, 4),))


def test_discovery_leaves_the_model_alone():
    model, inputs = make("bare")
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    find_weights(model, inputs)
    for name, parameter in model.named_parameters():
        assert before[name][0] == id(parameter)
        assert torch.equal(before[name][1], parameter)
