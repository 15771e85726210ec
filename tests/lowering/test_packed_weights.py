"""What `verify` sees of lowered models."""

import copy

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.kernels import PackingError
from fx_sparsity.lowering import check_packed, lower, timing
from fx_sparsity.lowering.lowered import ByTokens
from fx_sparsity.lowering.packed_weights import read_packed
from fx_sparsity.verification import SparsityLostError
from tests.lowering import test_lower

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
MAPPING = fxs.SparsityMapping().set_global("unstructured 60%")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def masked(model=None, x=X, mapping=MAPPING):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model.eval(), sparsifier, (x,), mapping)
    sparsifier.step()
    return fxs.squash(model, sparsifier)


def quantized(model, config):
    import torchao.quantization as ao

    ao.quantize_(model, getattr(ao, config)())
    return model


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(32, 64), nn.ReLU())


FLOWS = {
    "float": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "int8 dynamic": lambda m: quantized(m, "Int8DynamicActivationInt8WeightConfig"),
    "int8 weight-only": lambda m: quantized(m, "Int8WeightOnlyConfig"),
    "graph": lambda model: torch.export.export(model, (X,)).module(),
    "decomposed graph": lambda m: torch.export.export(m, (X,)).run_decompositions().module(),
    "program": lambda model: torch.export.export(model, (X,)),
}


def corrupted(model):
    """A copy with one value where zeros should be."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        weight = model[0].weight
        weight[weight == 0] = 1e-3 * torch.arange(int((weight == 0).sum())).eq(7)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flow", FLOWS)
def test_a_lowered_model_is_verified_weight_by_weight(flow):
    model, record = masked()
    inputs = None if flow == "program" else (X.bfloat16() if flow == "bfloat16" else X,)
    lowered, report = lower(FLOWS[flow](copy.deepcopy(model)), inputs, "always", record=record)
    assert report.lowered == ("0.weight", "2.weight")
    found = fxs.verify(lowered, record).raise_if_lost()
    assert [row.fqn for row in found] == ["0.weight", "2.weight"]
    assert all(row.zero_in_code == row.wanted > 0 for row in found)
    assert "packed as bitmask" in found[0].scheme
    alone = fxs.verify(lowered)
    assert {row.fqn: row.pattern for row in alone} == {
        row.fqn: row.pattern for row in fxs.verify(model)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flow", ["float", "graph", "decomposed graph", "program"])
def test_a_lost_zero_is_found_in_what_was_packed(flow):
    model, record = masked()
    inputs = None if flow == "program" else (X,)
    lowered, _ = lower(FLOWS[flow](corrupted(model)), inputs, "always")
    with pytest.raises(SparsityLostError, match=r"^0.weight: 1 of 1843 zeros lost"):
        fxs.verify(lowered, record).raise_if_lost()


def test_programs_that_were_exported_after_lowering_are_read(tmp_path):
    model, record = masked()
    lowered, _ = lower(copy.deepcopy(model), (X,), "always")
    torch.export.save(torch.export.export(lowered, (X,)), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    found = fxs.verify(program, record).raise_if_lost()
    assert [row.where for row in found] == ["0.weight", "2.weight"]


def test_storage_as_in_by_out_is_compared_as_such():
    model, record = masked(conv1d())
    lowered, report = lower(model, (X,), "always")
    assert report.lowered == ("0.weight",)
    assert fxs.verify(lowered, record).raise_if_lost()[0].pattern == "unstructured"


def test_both_forms_are_verified(monkeypatch):
    model, record = masked()
    timed = [timing.Timing("eager", 100.0, 100.0 / gain, gain, gain) for gain in (2.0, 0.5)]

    def measure(layer, packed, tokens, **rest):
        return {name: dict(zip(tokens, timed, strict=True)) for name in packed}

    monkeypatch.setattr(timing, "measure", measure)
    lowered, _ = lower(model, (X,), tokens=(1, 64), keep_dense=True)
    assert isinstance(lowered[0], ByTokens)
    found = fxs.verify(lowered, record).raise_if_lost()
    assert [row.where for row in found][:2] == ["0.packed.weight", "0.dense.weight"]
    lowered[0].dense.weight.add_(1)
    with pytest.raises(SparsityLostError, match=r"^0.weight: 1843 of 1843 zeros lost"):
        fxs.verify(lowered, record).raise_if_lost()


def test_a_node_that_sees_a_part_of_a_weight_is_compared_with_that_part():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 96))

        def forward(self, x):
            return x @ self.weight[:, :32], x @ self.weight[:, 32:]

    model, record = masked(Split())
    graph = torch.export.export(model, (X,)).run_decompositions().module()
    lowered, report = lower(graph, None, "always")
    assert set(report.lowered) == {"weight"}
    found = fxs.verify(lowered, record).raise_if_lost()
    assert sum(row.wanted for row in found) == int((~record["weight"].keep).sum())
    assert len(found) == 2


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_tables_are_read_by_their_values(coded):
    model = nn.Sequential(nn.EmbeddingBag(100, 16, mode="sum"))
    tokens = torch.randint(100, (4, 6))
    mapping = fxs.SparsityMapping().set_global("rows 50%")
    model, record = masked(model, tokens, mapping)
    if coded:
        model = fxs.post_training_sparse_quantize(
            model, fxs.DataNormSparsifier, sparsify_first=True, sparsity_level=0.0
        )
    lowered, report = lower(model, (tokens,), "always")
    assert report["0.weight"].kernel == "rows"
    (row,) = fxs.verify(lowered, record).raise_if_lost()
    assert (row.wanted, row.quantized) == (50 * 16, coded)


def test_what_is_packed_already_has_a_row_that_says_so():
    lowered, _ = lower(masked()[0], (X,), {"0": "always"})
    _, report = lower(lowered, (X,), {"2": "always"})
    assert report.dense == {"0.weight": "it is packed already"}
    assert report.lowered == ("2.weight",)


def test_packed_weights_are_not_written():
    lowered, _ = lower(masked()[0], (X,), "always")
    weight = next(iter(read_packed(lowered)))
    with pytest.raises(TypeError, match="0.weight is packed: unlower the model"):
        weight.set_zero(torch.zeros(48, 64, dtype=torch.bool))


def spoil(parts):
    """A mask that keeps one value more than there are."""
    mask = parts["mask"]
    mask.view(-1)[(mask.view(-1) != 255).nonzero()[0]] = 255


def test_corrupt_layers_are_refused_when_they_are_unpickled(tmp_path):
    lowered, _ = lower(masked()[0], (X,), "always")
    torch.save(lowered, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(X), lowered(X))
    empty = torch.load(tmp_path / "model.pt", weights_only=False, map_location="meta")
    assert empty[0].values.is_meta
    spoil(lowered[2].parts())
    copy.deepcopy(lowered)  # what is in memory was checked
    torch.save(lowered, tmp_path / "model.pt")
    with pytest.raises(PackingError, match="offsets do not follow"):
        torch.load(tmp_path / "model.pt", weights_only=False)
    with pytest.raises(PackingError, match="^2.weight: offsets do not follow"):
        check_packed(lowered)


def test_corrupt_programs_are_found(tmp_path):
    lowered, _ = lower(torch.export.export(masked()[0], (X,)), policy="always")
    check_packed(lowered)
    spoil({"mask": lowered.state_dict["fx_sparsity_kernels.2.weight.mask"]})
    torch.export.save(lowered, tmp_path / "program.pt2")
    with pytest.raises(PackingError, match="^2.weight: offsets do not follow"):
        check_packed(torch.export.load(tmp_path / "program.pt2"))
    table, _ = lower(pruned_bag(), (torch.randint(100, (4, 6)),), "always")
    check_packed(table)
    table[0].remap[0] = 77
    torch.save(table, tmp_path / "table.pt")
    with pytest.raises(PackingError, match="remap"):
        torch.load(tmp_path / "table.pt", weights_only=False)
    with pytest.raises(PackingError, match="^0.weight: remap"):
        check_packed(table)


def pruned_bag():
    model = nn.Sequential(nn.EmbeddingBag(100, 16, mode="sum"))
    model[0].weight[::2] = 0
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flow", ["eager dynamic", "fx dynamic", "pt2e dynamic", "pt2e static"])
def test_every_flow_keeps_its_zeros_when_it_is_lowered(flow):
    model = test_lower.FLOWS[flow]()
    before = {row.fqn: row.zeros for row in fxs.verify(model)}
    lowered, report = lower(model, (X,), "always")
    assert set(report.lowered) == set(before) == {"0.weight", "2.weight"}
    assert {row.fqn: row.zeros for row in fxs.verify(lowered)} == before


def test_a_part_that_a_graph_does_not_hold_is_told():
    """As in packages, into whose code AOTInductor writes small constants."""
    model, record = masked(nn.Sequential(nn.Linear(64, 48)))
    lowered, _ = lower(model, (X,), {"0": "bitmask"})
    graph = torch.export.export(lowered, (X,)).module()
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target.endswith("offsets"):
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.placeholder("elsewhere"))
    graph.recompile()
    (row,) = (row for row in fxs.verify(graph, record) if row.fqn == "0.weight")
    assert [fault.partition(":")[0] for fault in row.faults] == ["its offsets cannot be read"]
    assert row.wanted == int((~record["0.weight"].keep).sum())
    assert any(row.obstacle.startswith("its offsets") for row in fxs.verify(graph))
