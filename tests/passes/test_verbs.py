"""The verbs as passes, in torch's `PassManager`, beside other people's."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fx_sparsity as fxs
from fx_sparsity import passes
from fx_sparsity.graph import prepare_plan
from fx_sparsity.sparsifier import MaskError, RecordedMasks
from tests.models import make

HALF = fxs.SparsityMapping().set_global("unstructured 60%")
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def exported(subject, inputs):
    return torch.export.export(subject, inputs).module()


def traced(subject, inputs):
    return fx.symbolic_trace(subject)


def pruned(mapping=HALF):
    """The oracle: the verbs on the module itself."""
    subject, sparsifier = model(), fxs.WeightNormSparsifier()
    fxs.prepare(subject, sparsifier, (X,), mapping)
    sparsifier.step()
    return fxs.squash(subject, sparsifier)


def test_prepare_looks_for_weights_once(monkeypatch):
    found, calls = prepare_plan.find_weights, []
    monkeypatch.setattr(
        prepare_plan, "find_weights", lambda *a, **k: calls.append(a) or found(*a, **k)
    )
    sparsifier = fxs.WeightNormSparsifier()
    masking = passes.Prepare(sparsifier, HALF)
    graph = masking(exported(model(), (X,))).graph_module
    assert len(calls) == 1
    assert sparsifier.names == ["0.weight", "2.weight"]
    again = passes.Prepare(other := fxs.WeightNormSparsifier(), HALF)
    again.requires(graph)  # of another graph than the one that it is called with
    again.call(exported(model(), (X,)))
    assert len(calls) == 3
    assert other.names == ["0.weight", "2.weight"]


class Gelu(PassBase):
    """Somebody else's pass."""

    def call(self, graph_module):
        for node in graph_module.graph.nodes:
            if node.op == "call_module" and isinstance(
                graph_module.get_submodule(node.target), nn.ReLU
            ):
                node.op, node.target = "call_function", nn.functional.gelu
            elif "relu" in str(node.target):
                node.target = nn.functional.gelu
        graph_module.recompile()
        return PassResult(graph_module, True)


@pytest.mark.parametrize("kind", [exported, traced])
def test_the_verbs_run_in_a_pass_manager_beside_others(kind):
    oracle, record = pruned()
    oracle[1] = nn.GELU()
    sparsifier = fxs.WeightNormSparsifier()
    squash, lower = passes.Squash(sparsifier), passes.Lower("always", (X,))
    manager = PassManager(
        [
            passes.Prepare(sparsifier, HALF),
            Gelu(),
            passes.Step(sparsifier),
            squash,
            lower,
        ],
        run_checks_after_each_pass=True,
    )
    manager.add_checks(lambda gm: gm.graph.lint())
    result = manager(kind(model(), (X,)))
    assert result.modified
    torch.testing.assert_close(result.graph_module(X), oracle(X))
    assert {fqn: m.keep.tolist() for fqn, m in squash.record.items()} == {
        fqn: m.keep.tolist() for fqn, m in record.items()
    }
    assert set(lower.report.lowered) == {"0.weight", "2.weight"}
    fxs.verify(result.graph_module, squash.record).raise_if_lost()


@pytest.mark.parametrize("kind", [exported, traced])
def test_masks_of_a_record_go_on_again_and_come_off_without_a_trace(kind):
    oracle, record = pruned()
    graph = kind(model(), (X,))
    before = {fqn: t.clone() for fqn, t in graph.state_dict().items()}
    masks = RecordedMasks(record)
    PassManager([passes.Prepare(masks), passes.Step(masks)])(graph)
    torch.testing.assert_close(graph(X), oracle(X))
    PassManager([passes.Unprepare(masks)])(graph)
    assert list(graph.state_dict()) == list(before)
    assert all(torch.equal(t, before[fqn]) for fqn, t in graph.state_dict().items())


@pytest.mark.parametrize("name", ["tied", "recommender", "convnet"])
def test_a_record_masks_any_model_as_it_was(name):
    subject, inputs = make(name)
    oracle, sparsifier = copy.deepcopy(subject), fxs.WeightNormSparsifier()
    fxs.prepare(oracle, sparsifier, inputs, HALF)
    sparsifier.step()
    expected = oracle(*inputs)
    masks = RecordedMasks(fxs.SparsityRecord.of(sparsifier))
    graph = exported(subject, inputs)
    PassManager([passes.Prepare(masks), passes.Step(masks), passes.Squash(masks)])(graph)
    torch.testing.assert_close(graph(*inputs), expected)


def test_a_program_is_passed_through_in_copies():
    oracle, record = pruned()
    program = torch.export.export(model(), (X,))
    dense = program.module()(X)
    masks = RecordedMasks(record)
    squash = passes.Squash(masks)
    now = program
    for each in (passes.Prepare(masks), passes.Step(masks), squash, passes.Lower("always")):
        now = each.on_program(now)
    torch.testing.assert_close(now.module()(X), oracle(X))
    torch.testing.assert_close(program.module()(X), dense)
    fxs.verify(now, squash.record).raise_if_lost()


def refused(passing, graph, message, error=Exception):
    before = graph.code, {fqn: t.clone() for fqn, t in graph.state_dict().items()}
    with pytest.raises(error, match=message):
        passing.requires(graph)
    with pytest.raises(Exception, match="An error occurred when running") as raised:
        PassManager([passing])(graph)
    assert isinstance(raised.value.__cause__, error)
    assert graph.code == before[0]
    assert list(graph.state_dict()) == list(before[1])
    assert all(torch.equal(t, before[1][fqn]) for fqn, t in graph.state_dict().items())


@pytest.mark.parametrize("kind", [exported, traced])
def test_what_is_required_is_told_by_name_and_nothing_is_changed(kind):
    graph = kind(model(), (X,))
    sparsifier = fxs.WeightNormSparsifier()
    small = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    fxs.prepare(small, sparsifier, (torch.randn(1, 8),), "2:4")
    sparsifier.step()
    record = fxs.SparsityRecord.of(sparsifier)
    refused(
        passes.Prepare(RecordedMasks(record)),
        graph,
        "0.weight: the record has a mask of 8 x 8, the weight is 64 x 64; give the record of this model",
        MaskError,
    )
    for foreign in (passes.Step, passes.Squash, passes.Unprepare):
        refused(foreign(sparsifier), graph, "0.weight, 2.weight", MaskError)
    mapping = fxs.SparsityMapping().set_module_name("1", "2:4")
    refused(passes.Prepare(fxs.WeightNormSparsifier(), mapping), graph, "'1'", ValueError)
    refused(
        passes.AnnotateWeights(fxs.find_weights(small, (torch.randn(1, 8),))),
        exported(model(), (X,)),
        "0.weight: the map says",
        ValueError,
    )
    live = fxs.WeightNormSparsifier()
    fxs.prepare(graph, live, mapping=HALF)
    refused(
        passes.Lower("always"),
        graph,
        "0.weight, 2.weight still masked: squash before lowering",
        fxs.lowering.LoweringError,
    )
