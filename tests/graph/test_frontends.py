"""Every frontend finds the same weights, with the same roles."""

import io
import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from fx_sparsity import SparsityMapping, WeightNormSparsifier, find_weights, prepare, squash
from fx_sparsity.graph import Reason
from fx_sparsity.graph.frontends import export_model
from tests.coverage import architectures
from tests.models import MODELS, make, make_bert

TRANSFORMERS = ["gpt2", "gpt_oss", "t5", "swin"]


def build(name):
    """A model, its positional and its keyword inputs."""
    if name in MODELS:
        return *make(name), {}
    if name == "bert":
        model, kwargs = make_bert()
        return model, (), kwargs
    return architectures.make(name)


def roles(weights):
    return {site.fqn: (site.roles, site.shape) for site in weights.sites}


def what_stays_dense(weights):
    return {u.fqn for u in weights.dense}


def compiled(model, args, kwargs, lower=False):
    """What a `torch.compile` backend finds in the one graph it receives, with and without a model."""
    found = []

    def backend(gm, inputs):
        def look(graph, _):
            found.append(find_weights(graph, inputs, model=model))
            found.append(find_weights(graph, inputs))
            return graph.forward

        return aot_autograd(fw_compiler=look)(gm, inputs) if lower else look(gm, inputs)

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    return found


KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def decompositions(name):
    """What is decomposed: all that torch decomposes by default and can."""
    table = torch.export.default_decompositions()
    if name == "gpt2":
        # torch's decomposition lays its result out in another way than the kernel, which the view
        # after it does not allow.
        del table[KERNEL]
    return table


def test_why_gpt2_keeps_an_attention_kernel():
    model, args, kwargs = build("gpt2")
    program = export_model(model, args or kwargs)
    with pytest.raises(ValueError, match="Cannot view a tensor with shape"):
        program.run_decompositions()
    kept = program.run_decompositions(decompositions("gpt2"))
    assert KERNEL in {node.target for node in kept.graph.nodes}


def loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize(
    "name",
    [
        *MODELS,
        "bert",
        "gpt2",
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in TRANSFORMERS
            if name != "gpt2"
        ),
    ],
)
def test_frontends_agree(name):
    model, args, kwargs = build(name)
    program = export_model(model, args or kwargs)
    expected = find_weights(program)
    assert roles(find_weights(model, args or kwargs)) == roles(expected)
    assert roles(find_weights(program.module())) == roles(expected)
    decomposed = program.run_decompositions(decompositions(name))
    assert roles(find_weights(decomposed)) == roles(expected)
    assert what_stays_dense(find_weights(decomposed)) == what_stays_dense(expected)
    held = find_weights(decomposed.module())
    assert (roles(held), held.frontend) == (roles(expected), "GraphModule")
    assert roles(find_weights(loaded(program))) == roles(expected)
    dynamo, nameless = compiled(model, args, kwargs)
    assert roles(dynamo) == roles(expected)
    assert dynamo.frontend == "torch.compile"
    assert sorted(map(str, roles(nameless).values())) == sorted(map(str, roles(expected).values()))
    lowered, _ = compiled(model, args, kwargs, lower=True)
    assert roles(lowered) == roles(expected)


def received(model, inputs):
    """The graph of a backend, with what it received."""
    caught = []

    def backend(gm, received):
        caught.append((gm, received))
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return caught[0]


SUBJECTS = {
    "exported module": lambda program, model, inputs: (program.module(), None),
    "decomposed module": lambda program, model, inputs: (
        program.run_decompositions().module(),
        None,
    ),
    "trace": lambda program, model, inputs: (fx.symbolic_trace(model), None),
    "program": lambda program, model, inputs: (program, None),
    "decomposed program": lambda program, model, inputs: (program.run_decompositions(), None),
    "loaded program": lambda program, model, inputs: (loaded(program), None),
    "Dynamo": lambda program, model, inputs: received(model, inputs),
}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [*((name, "2:4 dense") for name in MODELS), ("bare", "channels 50%"), ("tied", "rows 40%")],
)
def test_frontends_agree_on_the_sparsity(name, pattern):
    mapping = SparsityMapping().set_global(pattern)
    model, inputs = make(name)
    sparsifier = WeightNormSparsifier()
    prepare(model, sparsifier, inputs, mapping)
    sparsifier.step()
    _, expected = squash(model, sparsifier)
    for kind, capture in SUBJECTS.items():
        fresh, inputs = make(name)
        program = torch.export.export(fresh, inputs, strict=False)
        subject, example_inputs = capture(program, fresh, inputs)
        sparsifier = WeightNormSparsifier()
        subject = prepare(subject, sparsifier, example_inputs, mapping)
        sparsifier.step()
        subject, record = squash(subject, sparsifier)
        assert set(record) == set(expected), kind
        held = (fresh if kind == "Dynamo" else subject).state_dict
        held = held() if callable(held) else held
        assert set(expected) <= held.keys()
        for fqn, mask in record.items():
            assert torch.equal(mask.keep, expected[fqn].keep), (kind, fqn)
            assert (mask.pattern, mask.roles) == (expected[fqn].pattern, expected[fqn].roles)
            for alias in (fqn, *expected[fqn].aliases):
                if alias in held:  # a traced GraphModule holds only what its graph reads
                    assert torch.equal(held[alias], model.get_parameter(fqn)), (kind, alias)


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_traces_agree(name):
    model, inputs = make(name)
    expected = find_weights(model, inputs)
    traced = find_weights(fx.symbolic_trace(model))
    assert roles(traced) == roles(expected)
    # A traced GraphModule holds only what its graph reads.
    read = [u.fqn for u in expected.dense if u.reason is not Reason.UNREACHABLE]
    assert [u.fqn for u in traced.dense] == read
    assert roles(find_weights(fx.symbolic_trace(model), inputs)) == roles(expected)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "MultiheadAttention", "TransformerEncoder"])
def test_operators_that_dynamo_leaves_whole(name):
    model, args, kwargs = build(name)
    expected = find_weights(model, args)
    dynamo, _ = compiled(model, args, kwargs)
    assert roles(dynamo) == roles(expected)


def test_which_operators_those_are():
    used = {}
    for name in ("LSTM", "MultiheadAttention", "TransformerEncoder"):
        model, args, kwargs = build(name)
        weights, _ = compiled(model, args, kwargs)
        used[name] = sorted({use.op for site in weights.sites for use in site.uses})
    assert_expected_inline(
        "\n".join(f"{name}: {', '.join(ops)}" for name, ops in used.items()),
        """\
LSTM: linear, lstm
MultiheadAttention: multi_head_attention_forward
TransformerEncoder: _transformer_encoder_layer_fwd""",
    )


class Branches(nn.Module):
    """Control flow that depends on data."""

    def __init__(self):
        super().__init__()
        self.first, self.then, self.never = (nn.Linear(4, 4) for _ in range(3))
        self.bare, self.unused = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.norm(self.first(x))
        if x.sum() > 1e9:
            return self.never(x) @ self.unused
        return self.then(x) @ self.bare


def test_graph_breaks_give_a_partial_map_with_reasons():
    model, inputs = Branches().train(), (torch.randn(2, 4),)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    weights = find_weights(model, inputs)
    assert_expected_inline(
        str(weights),
        """\
weight        kind    axes          dtype    uses  tied to
------------  ------  ------------  -------  ----  -------
first.weight  linear  out 4 x in 4  float32     1
then.weight   linear  out 4 x in 4  float32     1
bare          matmul  in 4 x out 4  float32     1
never.weight  linear  out 4 x in 4  float32     1

stays dense  shape   reason
-----------  ------  ---------------------------------------------------------------------
unused       (4, 4)  the graph does not show it: torch.export: GuardOnDataDependentSymNode
(5 one-dimensional parameters; read from Dynamo (2 graphs), no FX trace (TraceError), module classes)""",
    )
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_module_that_hides_from_every_graph():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.bare = nn.Parameter(torch.randn(4, 4))

        @torch.compiler.disable
        def forward(self, x):
            return torch.from_numpy(self.inner(x).detach().numpy() @ self.bare.detach().numpy())

    weights = find_weights(Hidden(), (torch.randn(2, 4),))
    assert list(weights) == ["inner.weight"]
    assert [(u.fqn, u.reason) for u in weights.dense] == [("bare", Reason.FRONTEND)]
    assert weights.frontend.endswith("module classes")


def test_a_trace_shows_what_export_and_dynamo_do_not():
    class Shy(nn.Module):
        def __init__(self):
            super().__init__()
            self.bare = nn.Parameter(torch.randn(4, 2))

        def forward(self, x):
            if torch.compiler.is_compiling():
                raise RuntimeError("not while compiling")
            return x @ self.bare

    weights = find_weights(Shy(), (torch.randn(2, 4),))
    assert weights["bare"].roles == ("in", "out")
    assert "FX trace" in weights.frontend


def test_without_inputs_only_classes_are_known():
    weights = find_weights(Branches())
    assert weights.frontend == "module classes, without example inputs"
    assert list(weights) == ["first.weight", "then.weight", "never.weight"]
    assert {u.fqn: u.reason for u in weights.dense} == dict.fromkeys(
        ["bare", "unused"], Reason.FRONTEND
    )


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model, inputs = MODELS["tied"]()
    assert roles(find_weights(model, inputs)) == roles(find_weights(*make("tied")))


def test_dynamic_shapes():
    class Expanding(nn.Linear):
        def forward(self, x):
            return torch.bmm(x.unsqueeze(1), self.weight.t().expand(x.shape[0], -1, -1))

    rows = torch.export.Dim("rows", min=2, max=64)
    weights = find_weights(Expanding(8, 4), (torch.randn(3, 8),), dynamic_shapes=({0: rows},))
    assert weights["weight"].roles == ("out", "in")
    traced = find_weights(fx.symbolic_trace(Expanding(8, 4)))
    assert traced["weight"].roles == ("out", "in")


def test_a_weight_used_in_several_graphs_keeps_every_use():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            x = x + self.shared
            if x.sum() > 1e9:
                return x
            x = x @ self.shared
            return x if x.sum() > 1e9 else x @ self.shared.t()

    weights = find_weights(Shared(), (torch.randn(4, 4),))
    assert [use.op for use in weights["shared"].uses] == ["matmul", "matmul"]
    assert weights.frontend == "Dynamo (3 graphs)"


class Fusable(nn.Module):
    """What a quantizer fuses, and a weight that it observes in the graph."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        self.bare = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(nn.functional.linear(x, self.bare))


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("qat", [False, True])
def test_what_prepare_fx_returns(qat):
    from torch.ao import quantization as tq
    from torch.ao.quantization import quantize_fx

    model, inputs = Fusable().train(qat), (torch.randn(2, 4, 6, 6),)
    expected = find_weights(model, inputs)
    if qat:
        config, quantizer_prepare = tq.get_default_qat_qconfig_mapping(), quantize_fx.prepare_qat_fx
    else:
        config, quantizer_prepare = tq.get_default_qconfig_mapping(), quantize_fx.prepare_fx
    weights = find_weights(quantizer_prepare(model, config, inputs))
    assert {re.sub(r"(\.0)+", "", fqn): role for fqn, role in roles(weights).items()} == {
        re.sub(r"(\.0)+", "", fqn): role for fqn, role in roles(expected).items()
    }
    assert not weights.dense
