import json

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch.nn import functional as F

from fx_sparsity import WeightNormSparsifier, find_weights, prepare
from fx_sparsity.graph import AnnotateWeights, DenseParameter, InputError, Reason
from fx_sparsity.graph.uses import noted_weights
from tests.coverage.proof import Proof
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

nothing of two or more dimensions stays dense
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

stays dense  shape   reason
-----------  ------  -------------------------------------------
position     (3, 8)  only added
unused       (4, 4)  does not reach the outputs for these inputs
(1 one-dimensional parameters; read from torch.export)""",
    )


def roles(weights):
    return {site.fqn: (site.kind, site.roles, site.shape) for site in weights.sites}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_claimed_or_explained(name):
    model, inputs = make(name)
    weights = find_weights(model, inputs)
    named = {*weights, *(u.fqn for u in weights.dense)}
    named |= {alias for site in weights.sites for alias in site.aliases}
    matrices = {n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    assert named == matrices
    vectors = [p for p in model.parameters() if p.ndim < 2]
    assert weights.vectors == len(vectors)
    assert all(u.reason.explained for u in weights.dense)


@pytest.mark.parametrize("name", MODELS)
def test_every_claim_holds_when_executed(name):
    model, inputs = make(name)
    program = torch.export.export(model, inputs, strict=False)
    proof = Proof(program.module(), inputs)
    for site in find_weights(program).sites:
        proof.check(site)


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
    class Foreign(nn.Linear):
        """A leaf of the trace, as modules of torch.nn are, but no class that the table knows."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, qualified_name):
            return True

    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.matrix

    model = nn.Sequential(Opaque(), Foreign(4, 4))
    weights = find_weights(fx.GraphModule(model, Tracer().trace(model)))
    assert list(weights) == ["1.weight"]
    assert weights.dense == (DenseParameter("0.matrix", (4, 4), Reason.FRONTEND, "inside Opaque"),)
    assert not Reason.FRONTEND.explained


def test_an_operator_without_a_row_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return torch.cdist(x, self.weight)

    (parameter,) = find_weights(Odd(), (torch.randn(2, 4),)).dense
    assert (parameter.reason, parameter.detail) == (Reason.OPERATOR, "cdist")
    assert not parameter.reason.explained


def test_the_map_serialises():
    model, inputs = make("tied")
    data = json.loads(json.dumps(find_weights(model, inputs).to_dict()))
    assert data["frontend"] == "torch.export"
    assert data["sites"][0]["roles"] == ["row", "dim"]
    assert data["vectors"] == 1


def test_inputs_that_the_model_rejects():
    model, _ = make("sequential")
    with pytest.raises(InputError, match=r"example_inputs: Sequential rejects them: RuntimeError"):
        find_weights(model, (torch.randn(3, 5),))
    with pytest.raises(InputError, match="found int"):
        find_weights(model, 3)


def test_discovery_leaves_the_model_alone():
    model, inputs = make("bare")
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    find_weights(model, inputs)
    for name, parameter in model.named_parameters():
        assert before[name][0] == id(parameter)
        assert torch.equal(before[name][1], parameter)


class Reparametrized(nn.Module):
    """Weights that reach their consumers behind arithmetic, norms, copies and lookups."""

    def __init__(self):
        super().__init__()

        def new(*shape):
            return nn.Parameter(torch.randn(shape))

        self.base, self.up, self.down, self.gain = new(8, 6), new(8, 2), new(2, 6), new(8, 1)
        self.register_buffer("mask", torch.ones(8, 6))
        self.left, self.right = new(4, 6), new(2, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.quantized, self.copied = new(6, 6), new(2, 3, 6)
        self.stacked = nn.ParameterList([new(6, 6) for _ in range(2)])
        self.banks, self.latents = new(5, 6, 6), new(4, 6)
        self.scales, self.position = new(3, 6), new(1, 1, 3, 3)

    def forward(self, x, chosen):
        x = F.linear(x, (self.base + self.up @ self.down) * self.gain * self.mask)
        x = self.spectral(self.normed(x))
        x = F.linear(x, torch.cat([self.left, self.right]))
        x = x @ torch.fake_quantize_per_tensor_affine(self.quantized, 0.01, 0, -128, 127).T
        x = x + F.linear(self.latents, self.copied.permute(2, 0, 1).reshape(6, 6)).mean(0)
        x = torch.bmm(x.expand(2, 3, 6), torch.stack(list(self.stacked))).sum(0)
        x = torch.bmm(x.unsqueeze(1), self.banks[chosen]).squeeze(1)
        activation = x * self.scales  # no weight: it depends on the inputs
        resized = F.interpolate(self.position, scale_factor=2, mode="bilinear")
        return activation @ (x.t() @ x) + resized.view(6, 6).sum(0)


def reparametrized():
    torch.manual_seed(0)
    return Reparametrized().eval(), (torch.randn(3, 6), torch.tensor([4, 0, 2]))


def test_weights_are_followed_through_what_does_not_depend_on_the_inputs():
    assert_expected_inline(
        str(find_weights(*reparametrized())),
        """\
weight                                    kind    axes                    dtype    uses  tied to
----------------------------------------  ------  ----------------------  -------  ----  -------
down                                      linear  out 2 x in 6            float32     1
up                                        linear  out 8 x in 2            float32     1
base                                      linear  out 8 x in 6            float32     1
normed.parametrizations.weight.original1  linear  out 6 x in 8            float32     1
spectral.weight                           linear  out 6 x in 6            float32     1
left                                      linear  out 4 x in 6            float32     1
right                                     linear  out 2 x in 6            float32     1
quantized                                 matmul  out 6 x in 6            float32     1
copied                                    linear  in 2 x in 3 x out 6     float32     1
latents                                   linear  out 4 x in 6            float32     1
stacked.0                                 matmul  in 6 x out 6            float32     1
stacked.1                                 matmul  in 6 x out 6            float32     1
banks                                     matmul  batch 5 x in 6 x out 6  float32     1

stays dense                               shape         reason
----------------------------------------  ------------  ---------------------------------------------
gain                                      (8, 1)        only scales, element by element: mul
scales                                    (3, 6)        only scales, element by element: mul
position                                  (1, 1, 3, 3)  only added: upsample_bilinear2d
normed.parametrizations.weight.original0  (6, 1)        only scales, element by element: _weight_norm
down: zeros do not survive: matmul
up: zeros do not survive: matmul
base: zeros do not survive: add
(2 one-dimensional parameters; read from torch.export)""",
    )


PARTS = ("left", "right", "stacked.0", "stacked.1")
"""Zeros of a part are no zeros of the whole that its consumer receives."""


def test_claims_behind_reparametrizations_hold_when_executed():
    model, inputs = reparametrized()
    program = torch.export.export(model, inputs, strict=False)
    proof = Proof(program.module(), inputs)
    for site in find_weights(program).sites:
        if site.fqn not in PARTS:
            proof.check(site)


class Switch(nn.Module):
    """Weights inside the branches of `torch.cond`, and in a region without gradients."""

    def __init__(self):
        super().__init__()
        self.frozen, self.yes, self.no = (nn.Linear(4, 4) for _ in range(3))
        self.bare = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen(x)
        branches = (lambda x: self.yes(x)), (lambda x: self.no(x))
        return torch.cond(x.sum() > 0, *branches, (x,)) @ self.bare


def test_subgraphs_are_read():
    weights = find_weights(Switch(), (torch.randn(2, 4),))
    assert weights.frontend == "torch.export"
    assert {site.fqn: site.roles for site in weights.sites} == {
        **dict.fromkeys(["frozen.weight", "yes.weight", "no.weight"], ("out", "in")),
        "bare": ("in", "out"),
    }


def test_writing_into_a_buffer_is_an_output():
    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            result = torch.zeros_like(x)
            result[:, :2] = self.inner(x)[:, :2]
            return result

    model = Writer()
    assert list(find_weights(model, (torch.randn(2, 4),))) == ["inner.weight"]
    assert list(find_weights(torch.export.export(model, (torch.randn(2, 4),)))) == ["inner.weight"]


def test_slices_of_a_map_are_a_batch():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 4, 2))

        def forward(self, x):
            return torch._higher_order_ops.map(lambda weight, x: x @ weight, self.stack, x)

    weights = find_weights(Mapped(), (torch.randn(5, 4),))
    assert weights["stack"].roles == ("batch", "in", "out")


def test_traces_without_shapes():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (nn.Parameter(torch.randn(n, 6)) for n in (4, 2))
            self.gain = nn.Parameter(torch.randn(6, 1))
            self.banks = nn.Parameter(torch.randn(5, 6, 6))

        def forward(self, x, chosen):
            x = F.linear(x, torch.cat([self.left, self.right]) * self.gain)
            return torch.bmm(x.unsqueeze(1), self.banks[chosen, :, :])

    model, inputs = Joined(), (torch.randn(3, 6), torch.tensor([4, 0, 2]))
    assert roles(find_weights(model, inputs))["banks"][1] == ("batch", "in", "out")
    assert set(find_weights(model, inputs)) == {"left", "right", "banks"}
    traced = find_weights(fx.symbolic_trace(model))
    assert roles(traced) == roles(find_weights(model, inputs))


def test_annotations_tell_how_a_weight_arrives():
    model, inputs = reparametrized()
    gm = torch.export.export(model, inputs, strict=False).module()
    AnnotateWeights(find_weights(model, inputs))(gm)
    seen = {
        weight.fqn: weight for node in gm.graph.nodes for weight in noted_weights(node).values()
    }
    copied = model.copied.permute(2, 0, 1).reshape(6, 6)
    assert torch.equal(seen["copied"].of(model.copied), copied)
    assert torch.equal(seen["quantized"].of(model.quantized), model.quantized.T)
    assert seen["base"].is_whole
    # What arrives of these is more than the weight, or less.
    assert not {"left", "right", "stacked.0", "banks"} & set(seen)


def test_a_parameter_of_one_element_is_read_without_a_warning(recwarn):
    find_weights(nn.Linear(4, 1), (torch.randn(2, 4),))
    assert [str(w.message) for w in recwarn if "scalar" in str(w.message)] == []
