"""Masks on the graphs that a `torch.compile` backend receives."""

import copy

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import fx_sparsity as fxs
from fx_sparsity.graph import MappingError
from fx_sparsity.graph.compiled import compiled_callable, source_target
from fx_sparsity.sparsifier import MaskError
from tests.models import MODELS, Delegating, make

HALF = fxs.SparsityMapping().set_global("unstructured 50%")
MOST = fxs.SparsityMapping().set_global("unstructured 75%")


def as_it_is(gm, inputs):
    return gm


def bound_forward(gm, inputs):
    return gm.forward


def through_aot(gm, inputs):
    return aot_autograd(fw_compiler=bound_forward)(gm, inputs)


def compiled(model, sparsifier, finish=as_it_is, mapping=HALF, given=None, **options):
    """`model` compiled by a backend that masks it, and the graphs that the backend received."""
    graphs = []

    def backend(gm, received):
        assert fxs.prepare(gm, sparsifier, received, mapping, model=given) is gm
        sparsifier.step()
        graphs.append(gm)
        return finish(gm, received)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, **options), graphs


def eager(name, mapping=HALF):
    """The oracle: the same sparsifier on the modules themselves."""
    model, inputs = make(name)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, mapping)
    sparsifier.step()
    return model, sparsifier


def assert_same_masks(sparsifier, expected):
    assert set(sparsifier.names) == set(expected.names)
    for fqn in expected.names:
        assert torch.equal(sparsifier.get_mask(fqn), expected.get_mask(fqn)), fqn


@pytest.mark.parametrize(
    ("finish", "named"),
    [(as_it_is, "by model"), (bound_forward, "by Dynamo"), (through_aot, "by Dynamo")],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_of_a_backend_is_masked_as_the_model_is(name, finish, named):
    model, inputs = make(name)
    dense = {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}
    untouched = model(*inputs)
    sparsifier = fxs.WeightNormSparsifier()
    given = model if named == "by model" else None
    call, graphs = compiled(model, sparsifier, finish, given=given)
    masked = call(*inputs)
    oracle, expected = eager(name)
    assert_same_masks(sparsifier, expected)
    torch.testing.assert_close(masked, oracle(*inputs))
    # A later level is seen by what is compiled already.
    for config in sparsifier.groups:
        config["sparsity_level"] = 0.75
    sparsifier.step()
    oracle, expected = eager(name, MOST)
    assert_same_masks(sparsifier, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(call(*inputs), oracle(*inputs))
    assert all(torch.equal(tensor, dense[fqn]) for fqn, tensor in model.state_dict().items())
    (gm,) = graphs
    assert fxs.unprepare(gm, sparsifier) is gm
    assert sparsifier.names == []
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(call(*inputs), untouched)
    assert all(torch.equal(tensor, dense[fqn]) for fqn, tensor in model.state_dict().items())


@pytest.mark.parametrize("finish", [as_it_is, bound_forward])
@pytest.mark.parametrize("name", MODELS)
def test_squash_bakes_into_the_parameters_of_the_compiled_module(name, finish):
    model, inputs = make(name)
    sparsifier = fxs.WeightNormSparsifier()
    call, graphs = compiled(model, sparsifier, finish)
    masked = call(*inputs)
    oracle, expected = eager(name)
    (gm,) = graphs
    plain, record = fxs.squash(gm, sparsifier)
    assert plain is gm
    assert not any(node.target is torch.ops.aten.where.self for node in gm.graph.nodes)
    oracle, _ = fxs.squash(oracle, expected)
    for fqn, tensor in oracle.state_dict().items():
        assert torch.equal(model.state_dict()[fqn], tensor), fqn
    torch.testing.assert_close(model(*inputs), masked)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(call(*inputs), masked)
    assert all(torch.equal(record[fqn].keep, expected.get_mask(fqn)) for fqn in expected.names)
    fxs.squash(gm, sparsifier)
    assert fxs.verify(model, record).raise_if_lost()


def test_inductor_sees_later_masks_and_trains_what_is_kept():
    model, inputs = make("tied")
    sparsifier = fxs.WeightNormSparsifier()
    call, _ = compiled(model, sparsifier, compile_fx)
    call(*inputs).square().sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for level in (25, 75):
            for config in sparsifier.groups:
                config["sparsity_level"] = level / 100
            sparsifier.step()
            model.zero_grad()
            masked = call(*inputs)
            masked.square().sum().backward()
            mapping = fxs.SparsityMapping().set_global(f"unstructured {level}%")
            oracle, expected = eager("tied", mapping)
            assert_same_masks(sparsifier, expected)
            truth = oracle(*inputs)
            truth.square().sum().backward()
            torch.testing.assert_close(masked, truth)
            for fqn in sparsifier.names:
                gradient = model.get_parameter(fqn).grad
                owner, _, attribute = fqn.rpartition(".")
                beneath = oracle.get_submodule(owner).parametrizations[attribute].original
                assert gradient[~sparsifier.get_mask(fqn)].eq(0).all()
                torch.testing.assert_close(gradient, beneath.grad)


def test_tied_weights_are_masked_once():
    model, inputs = make("tied")
    sparsifier = fxs.WeightNormSparsifier()
    call, (graphs) = compiled(model, sparsifier, given=model)
    call(*inputs)
    (gm,) = graphs
    assert [name for name in gm.state_dict() if "embed" in name or "head" in name] == [
        "sparsity_masks.embed.weight.mask"
    ]
    assert sparsifier.aliases()["embed.weight"] == ("head.weight",)


@pytest.mark.parametrize("given", [True, False])
def test_another_graph_of_the_same_weights_shares_their_masks(given):
    model, inputs = make("sequential")
    sparsifier = fxs.WeightNormSparsifier()
    graphs = []

    def backend(gm, received):
        fxs.prepare(gm, sparsifier, received, HALF, model=model if given else None)
        if not graphs:
            sparsifier.step()
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    call = torch.compile(model, backend=backend, dynamic=False)
    wide = torch.randn(7, 8)
    call(*inputs), call(wide)
    oracle, expected = eager("sequential")
    assert len(graphs) == 2
    assert_same_masks(sparsifier, expected)
    torch.testing.assert_close(call(wide), oracle(wide))
    sparsifier.get_mask("2.weight").zero_()
    for x in (*inputs, wide):
        assert torch.equal(call(x), model[2].bias.expand(len(x), -1))


class Breaking(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("given", [True, False])
def test_graph_breaks_give_one_sparsifier_several_graphs(given):
    torch.manual_seed(0)
    model, x = Breaking(), torch.randn(2, 4)
    sparsifier = fxs.WeightNormSparsifier()
    call, graphs = compiled(model, sparsifier, given=model if given else None)
    masked = call(x)
    assert len(graphs) == 2
    assert sparsifier.names == ["first.weight", "second.weight"]
    _, record = fxs.squash(model, sparsifier)
    torch.testing.assert_close(model(x), masked)
    assert all(mask.keep.float().mean() == 0.5 for mask in record.values())


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.ModuleList([mlp(), nn.Linear(4, 4)])
        self.keyed = nn.ModuleDict({"a-b": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.plain = nn.ParameterList([torch.randn(4, 4)])
        self.norm = nn.BatchNorm1d(4)
        self.own = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        for module in (*self.items, *self.keyed.values()):
            x = module(x)
        return self.norm(x @ self.plain[0] @ self.own)


def part_compiled():
    return torch.compile(mlp(), backend="eager")


@pytest.mark.parametrize(
    "make_module",
    [
        mlp,
        Containers,
        lambda: Delegating(mlp()),
        lambda: Delegating(Delegating(Containers())),
        lambda: nn.Sequential(Delegating(mlp())),
        lambda: nn.DataParallel(Delegating(mlp())),
        lambda: nn.ModuleDict({"part": Delegating(mlp())})["part"],
        lambda: nn.Sequential(part_compiled()),
        lambda: nn.Sequential(Delegating(part_compiled())),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
)
@pytest.mark.parametrize("way", ["module", "function", "method"])
def test_names_count_from_the_compiled_module(make_module, way):
    """The oracle: the names that the module itself has for the tensors that the graph receives."""
    module = make_module().eval()
    named = {id(t): fqn for fqn, t in (*module.named_parameters(), *module.named_buffers())}
    seen = set()

    def backend(gm, received):
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), received, strict=True):
            assert source_target(node) == named.get(id(value))
            seen.add(id(value))
        owner = compiled_callable()
        assert owner is (call if way == "function" else module)
        return gm.forward

    def call(x):
        return module(x)

    torch._dynamo.reset()
    given = {"module": module, "function": call, "method": module.forward}[way]
    torch.compile(given, backend=backend)(torch.randn(2, 4))
    assert {id(parameter) for parameter in module.parameters()} <= seen


def test_a_compiled_part_of_an_eager_module_has_names_of_its_own():
    part = mlp()
    names, owners = [], []

    def backend(gm, received):
        names.extend(filter(None, map(source_target, gm.graph.find_nodes(op="placeholder"))))
        owners.append(compiled_callable())
        return gm.forward

    torch._dynamo.reset()
    Delegating(torch.compile(part, backend=backend))(torch.randn(2, 4))
    assert names == [name for name, _ in part.named_parameters()]
    assert owners == [part]
    assert compiled_callable() is None


def test_graph_breaks_hide_the_compiled_module_from_no_graph():
    class Deeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Breaking()

        def forward(self, x):
            return self.inner(x) + 1

    module, owners = Deeper(), []

    def backend(gm, received):
        owners.append(compiled_callable())
        return gm.forward

    torch.compile(module, backend=backend)(torch.randn(2, 4))
    torch._dynamo.reset()
    module.compile(backend=backend)
    module(torch.randn(2, 4))
    assert len(owners) >= 4
    assert all(owner is module for owner in owners)


def test_masks_survive_copying_and_rebuilding_the_graph():
    model, inputs = make("sequential")
    sparsifier = fxs.WeightNormSparsifier()
    received = []

    def finish(gm, inputs):
        received.extend(inputs)
        return gm

    call, graphs = compiled(model, sparsifier, finish)
    expected = call(*inputs)
    (gm,) = graphs
    assert all(
        isinstance(node.meta["example_value"], torch.Tensor)
        for node in gm.graph.nodes
        if "mask" in str(node.target) or node.target is torch.ops.aten.where.self
    )
    rebuilt = fx.GraphModule(gm, gm.graph)
    rebuilt.graph.eliminate_dead_code()
    rebuilt.recompile()
    for survivor in (rebuilt, copy.deepcopy(gm)):
        assert torch.equal(survivor(*received)[0], expected)
    fxs.prepare(gm, sparsifier, received, HALF)
    assert torch.equal(call(*inputs), expected)
    assert sum(node.target is torch.ops.aten.where.self for node in gm.graph.nodes) == 2
    sparsifier.load_state_dict(eager("sequential", MOST)[1].state_dict())
    assert sparsifier.get_mask("0.weight").sum() == 32
    assert torch.equal(call(*inputs), eager("sequential", MOST)[0](*inputs))


def test_a_model_with_masks_keeps_them():
    model, inputs = make("sequential")
    first, second = fxs.WeightNormSparsifier(), fxs.WeightNormSparsifier()
    fxs.prepare(model, first, inputs, HALF)
    call, graphs = compiled(model, second, given=model)
    call(*inputs)
    assert graphs[0].state_dict() == {}
    assert_same_masks(first, second)
    assert first.get_mask("0.weight").sum() == 64


def refused(match, inputs_of=list, **options):
    """A backend that checks that `prepare` refuses its graph and changes nothing."""
    seen = []

    def backend(gm, received):
        code, sparsifier = gm.code, fxs.WeightNormSparsifier()
        with pytest.raises((MaskError, MappingError), match=match):
            fxs.prepare(gm, sparsifier, inputs_of(received), **options)
        assert (gm.code, dict(gm.state_dict()), sparsifier.names) == (code, {}, [])
        seen.append(gm)
        return gm.forward

    return backend, seen


def test_what_cannot_be_masked_is_refused_by_name():
    model, inputs = make("sequential")
    unknown = fxs.SparsityMapping().set_module_name("nope", "2:4")
    masked = copy.deepcopy(model)
    fxs.prepare(masked, fxs.WeightNormSparsifier(), inputs)
    for subject, backend, seen in [
        (model, *refused("no weight or owning module 'nope'", mapping=unknown)),
        (masked, *refused("0.weight is parametrized in the compiled module; pass model=")),
    ]:
        torch._dynamo.reset()
        torch.compile(subject, backend=backend)(*inputs)
        assert len(seen) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_graphs_below_aot_autograd(grad):
    """They tell their weights by the model alone; what leads to gradients only is no use of one."""
    model, inputs = make("sequential")
    expected = fxs.find_weights(model, inputs)
    maps, sparsifier = [], fxs.WeightNormSparsifier()

    def look(gm, fakes):
        maps.append(fxs.find_weights(gm, model=model))
        if grad:
            with pytest.raises(MaskError, match="a backward pass is traced already"):
                fxs.prepare(gm, sparsifier, fakes, HALF, model=model)
        else:
            with pytest.raises(MaskError, match="arg0_1, arg1_1, .* pass model="):
                fxs.prepare(gm, sparsifier, fakes, HALF)
            fxs.prepare(gm, sparsifier, fakes, HALF, model=model)
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        backend = aot_autograd(fw_compiler=look)
        call = torch.compile(model, backend=backend)
        result = call(*inputs)
        if grad:
            result.sum().backward()
            forward, backward = maps
            assert list(backward) == []
            assert {u.fqn for u in backward.dense} == set(expected)
        else:
            (forward,) = maps
            sparsifier.step()
            oracle, masks = eager("sequential")
            assert_same_masks(sparsifier, masks)
            torch.testing.assert_close(call(*inputs), oracle(*inputs))
    assert {s.fqn: s.roles for s in forward.sites} == {s.fqn: s.roles for s in expected.sites}


class Masking(CustomGraphPass):
    """An Inductor pass that maps its graph by the model, and masks it."""

    def __init__(self, model, sparsifier):
        self.model, self.sparsifier, self.maps = model, sparsifier, []

    def __call__(self, graph):
        gm = graph.owning_module
        self.maps.append(fxs.find_weights(gm, model=self.model))
        fxs.prepare(gm, self.sparsifier, mapping=HALF, model=self.model)

    def uuid(self):
        return None  # a cached result would come without the masks


def test_an_inductor_pass_finds_and_masks_the_weights_of_its_graph():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(3, 8)
    oracle, expected = copy.deepcopy(model), fxs.WeightNormSparsifier()
    sparsifier = fxs.WeightNormSparsifier()
    masking = Masking(model, sparsifier)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(post_grad_custom_pre_pass=masking):
        call = torch.compile(model)
        torch.testing.assert_close(call(inputs), model(inputs))
    (found,) = masking.maps
    assert {site.fqn: site.roles for site in found.sites} == dict.fromkeys(
        ("0.weight", "2.weight"), ("out", "in")
    )
    sparsifier.step()
    fxs.prepare(oracle, expected, (inputs,), HALF)
    expected.step()
    assert_same_masks(sparsifier, expected)
    with torch.no_grad():
        torch.testing.assert_close(call(inputs), oracle(inputs))
        fxs.unprepare(model, sparsifier)
        torch.testing.assert_close(call(inputs), model(inputs))


def test_what_aot_autograd_makes_of_a_masked_graph_still_shows_its_weights():
    model, inputs = make("tied")
    maps = []

    def look(gm, fakes):
        maps.append(fxs.find_weights(gm, model=model))
        return gm.forward

    call, _ = compiled(model, fxs.WeightNormSparsifier(), aot_autograd(fw_compiler=look))
    with torch.no_grad():
        call(*inputs)
    expected = fxs.find_weights(model, inputs)
    assert {s.fqn: s.roles for s in maps[0].sites} == {s.fqn: s.roles for s in expected.sites}
