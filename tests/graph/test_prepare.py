import copy
import io
import logging

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn.utils import parametrize

import fx_sparsity as fxs
from fx_sparsity.graph import InputError, InsertMasks, MappingError, RemoveMasks
from fx_sparsity.sparsifier import MaskError
from tests.models import MODELS, make, make_bert
from tests.sparsifier.test_base import assert_unchanged, snapshot

HALF = fxs.SparsityMapping().set_global("unstructured 50%")


def as_module(model, inputs):
    return model


def as_exported(model, inputs):
    return torch.export.export(model, inputs, strict=False).module()


def as_traced(model, inputs):
    return fx.symbolic_trace(model)


@pytest.mark.parametrize("kind", [as_module, as_exported, as_traced])
@pytest.mark.parametrize("name", MODELS)
def test_prepare_step_squash(name, kind):
    model, inputs = make(name)
    weights = find = fxs.find_weights(model, inputs)
    dense = {fqn: model.get_parameter(fqn).detach().clone() for fqn in find}
    subject = kind(model, inputs)
    untouched = subject(*inputs)
    sparsifier = fxs.WeightNormSparsifier()
    assert fxs.prepare(subject, sparsifier, inputs, HALF) is subject
    assert torch.equal(subject(*inputs), untouched)
    sparsifier.step()
    masked = subject(*inputs)
    assert not torch.equal(masked, untouched)
    plain, record = fxs.squash(subject, sparsifier)
    assert torch.equal(plain(*inputs), masked)
    assert set(record) == set(weights)
    for fqn, weight in dense.items():
        magnitude = weight.abs().double()
        zeros = plain.get_parameter(fqn) == 0
        assert zeros.sum() == round(weight.numel() / 2)
        assert magnitude[zeros].max() <= magnitude[~zeros].min()
        assert torch.equal(plain.get_parameter(fqn)[~zeros], weight[~zeros])
        assert torch.equal(record[fqn].keep, ~zeros)
    assert not any("mask" in name for name in plain.state_dict())


def test_two_of_four_runs_along_the_reduced_axis():
    for name in ("bare", "convnet", "recommender"):
        model, inputs = make(name)
        mapping = fxs.SparsityMapping().set_global("2:4 dense")
        sparsifier = fxs.WeightNormSparsifier()
        fxs.prepare(model, sparsifier, inputs, mapping)
        sparsifier.step()
        for site in fxs.find_weights(model, inputs).sites:
            (axis,) = [d for d, role in enumerate(site.roles) if role in ("in", "dim")]
            groups = sparsifier.get_mask(site.fqn).movedim(axis, -1)
            groups = groups[..., : groups.shape[-1] // 4 * 4].unflatten(-1, (-1, 4))
            assert groups.sum(-1).eq(2).all(), site.fqn


def lines(gm):
    """The nodes that matter here, in a form that torch's releases agree on."""
    return "\n".join(
        f"{node.name} = {node.target}{tuple(node.args) if node.args else ''}"
        for node in gm.graph.nodes
        if node.op in ("get_attr", "call_function")
    )


def test_a_small_graph_before_and_after_the_passes():
    model, inputs = make("tied")
    gm = as_exported(model, inputs)
    before = lines(gm)
    mask = fxs.Mask(torch.ones(32, 8, dtype=torch.bool))
    insert = InsertMasks({"embed.weight": mask, "head.weight": mask})
    masked = PassManager([insert])(gm).graph_module
    assert_expected_inline(
        before,
        """\
embed_weight = embed.weight
block_weight = block.weight
block_bias = block.bias
head_weight = head.weight
embedding = aten.embedding.default(head_weight, tokens)
linear = aten.linear.default(embedding, block_weight, block_bias)
relu = aten.relu.default(linear,)
linear_1 = aten.linear.default(relu, head_weight)""",
    )
    assert_expected_inline(
        lines(masked),
        """\
embed_weight = embed.weight
block_weight = block.weight
block_bias = block.bias
head_weight = head.weight
sparsity_masks_head_weight_mask = sparsity_masks.head.weight.mask
sparsity_masks_head_weight_zero = sparsity_masks.head.weight.zero
where_self = aten.where.self(sparsity_masks_head_weight_mask, head_weight, sparsity_masks_head_weight_zero)
embedding = aten.embedding.default(where_self, tokens)
linear = aten.linear.default(embedding, block_weight, block_bias)
relu = aten.relu.default(linear,)
linear_1 = aten.linear.default(relu, where_self)""",
    )
    plain = PassManager([RemoveMasks()])(masked).graph_module
    assert lines(plain) == before


def test_masks_in_a_graph_survive_rebuilding_copying_and_dead_code_elimination():
    model, inputs = make("tied")
    gm = as_exported(model, inputs)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(gm, sparsifier, mapping=HALF)
    sparsifier.step()
    expected = gm(*inputs)
    rebuilt = fx.GraphModule(gm, gm.graph)
    rebuilt.graph.eliminate_dead_code()
    rebuilt.recompile()
    for survivor in (rebuilt, copy.deepcopy(gm)):
        assert torch.equal(survivor(*inputs), expected)
        assert any(name.endswith("mask") for name in survivor.state_dict())
    sparsifier.get_mask("embed.weight").zero_()
    assert rebuilt(*inputs).eq(0).all()
    plain, _ = fxs.squash(rebuilt, sparsifier)
    assert plain.get_parameter("embed.weight").eq(0).all()


def test_inserted_nodes_have_values():
    model, inputs = make("sequential")
    gm = as_exported(model, inputs)
    fxs.prepare(gm, fxs.WeightNormSparsifier(), mapping=HALF)
    for node in gm.graph.nodes:
        if "mask" in str(node.target) or node.name.startswith("where"):
            assert isinstance(node.meta["val"], torch.Tensor)


def test_transformers_take_keyword_inputs():
    model, inputs = make_bert()
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, fxs.SparsityMapping().set_global("2:4"))
    sparsifier.step()
    masked = model(**inputs).last_hidden_state
    model, record = fxs.squash(model, sparsifier)
    assert torch.equal(model(**inputs).last_hidden_state, masked)
    assert all(abs(mask.keep.float().mean() - 0.5) < 1e-6 for mask in record.values())


def test_what_stays_dense_is_logged_with_the_reason(caplog):
    model, inputs = make("bare")
    mapping = fxs.SparsityMapping().set_module_name("plain", "2:4")
    with caplog.at_level(logging.INFO, logger="fx_sparsity"):
        fxs.prepare(model, fxs.WeightNormSparsifier(), inputs, mapping)
    assert "table stays dense: no entry of the mapping speaks of it" in caplog.text
    assert "position stays dense: only added" in caplog.text


@pytest.mark.parametrize("kind", [as_module, as_exported])
@pytest.mark.parametrize(
    ("mapping", "inputs", "error"),
    [
        (fxs.SparsityMapping().set_module_name("nope", "2:4"), None, MappingError),
        (fxs.SparsityMapping().set_global("8:16"), None, MappingError),
        (HALF, (torch.randn(3, 5),), InputError),
    ],
)
def test_a_refused_prepare_changes_nothing(kind, mapping, inputs, error):
    model, good = make("recommender")
    subject = kind(model, good)
    if isinstance(subject, fx.GraphModule) and error is InputError:
        return  # a graph is not run on inputs
    before = snapshot(subject)
    sparsifier = fxs.WeightNormSparsifier()
    with pytest.raises(error):
        fxs.prepare(subject, sparsifier, inputs or good, mapping)
    assert_unchanged(subject, before)
    assert sparsifier.names == []


@pytest.mark.parametrize("kind", [as_module, as_exported, as_traced])
def test_preparing_is_idempotent_and_another_sparsifier_takes_over(kind):
    model, inputs = make("sequential")
    subject = kind(model, inputs)
    first = fxs.WeightNormSparsifier()
    fxs.prepare(subject, first, inputs, HALF)
    first.step()
    before = snapshot(subject)
    fxs.prepare(subject, first, inputs, HALF)
    assert_unchanged(subject, before)
    assert len(first.groups) == 2
    second = fxs.WeightNormSparsifier()
    fxs.prepare(subject, second, inputs, fxs.SparsityMapping().set_global("2:4"))
    assert_unchanged(subject, before)
    second.step()
    plain, record = fxs.squash(subject, second)
    assert {mask.pattern for mask in record.values()} == {"2:4"}
    assert plain.get_parameter("0.weight").eq(0).view(-1, 4).sum(1).eq(2).all()
    first.squash_mask()


def test_squash_wants_the_model_that_was_prepared():
    model, inputs = make("sequential")
    sparsifier = fxs.WeightNormSparsifier()
    with pytest.raises(MaskError, match="it has prepared none"):
        fxs.squash(model, sparsifier)
    fxs.prepare(model, sparsifier, inputs, HALF)
    with pytest.raises(MaskError, match=r"0.weight, 2.weight"):
        fxs.squash(make("sequential")[0], sparsifier)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_is_masked_in_a_copy(name):
    model, inputs = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program = torch.export.export(model, inputs, strict=False)
    graph, expected = str(program.graph), program.module()(*inputs)
    sparsifier = fxs.WeightNormSparsifier()
    masked = fxs.prepare(program, sparsifier, mapping=HALF)
    assert torch.equal(masked.module()(*inputs), expected)
    sparsifier.step()
    sparse = masked.module()(*inputs)
    assert not torch.equal(sparse, expected)
    file = io.BytesIO()
    torch.export.save(masked, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(*inputs), sparse)
    with torch.no_grad():
        assert torch.equal(masked.run_decompositions().module()(*inputs), sparse)
    assert torch.equal(copy.deepcopy(masked).module()(*inputs), sparse)
    swept = masked.module()
    swept.graph.eliminate_dead_code()
    swept.recompile()
    assert torch.equal(swept(*inputs), sparse)
    again = fxs.prepare(masked, fxs.WeightNormSparsifier(), mapping=HALF)
    assert again is masked
    plain, record = fxs.squash(masked, sparsifier)
    assert torch.equal(plain.module()(*inputs), sparse)
    assert str(plain.graph) == graph
    assert set(record) == set(fxs.find_weights(model, inputs))
    assert plain.state_dict.keys() == program.state_dict.keys()
    # Neither the program nor the model that it came from has changed.
    assert str(program.graph) == graph
    assert torch.equal(program.module()(*inputs), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [as_module, as_exported, as_traced])
@pytest.mark.parametrize("name", MODELS)
def test_unprepare_gives_the_original_back(name, kind):
    model, inputs = make(name)
    subject = kind(model, inputs)
    before = snapshot(subject)
    code = lines(subject) if isinstance(subject, fx.GraphModule) else ""
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(subject, sparsifier, inputs, HALF)
    sparsifier.step()
    assert fxs.unprepare(subject, sparsifier) is subject
    assert_unchanged(subject, before)
    assert not code or lines(subject) == code
    assert sparsifier.names == []
    assert sparsifier.groups == []
    fxs.prepare(subject, sparsifier, inputs, HALF)
    sparsifier.step()
    fxs.squash(subject, sparsifier)
    with pytest.raises(MaskError, match="its mask is squashed"):
        fxs.unprepare(subject, sparsifier)


def test_unprepare_of_a_program():
    model, inputs = make("tied")
    program = torch.export.export(model, inputs, strict=False)
    sparsifier = fxs.WeightNormSparsifier()
    masked = fxs.prepare(program, sparsifier, mapping=HALF)
    sparsifier.step()
    plain = fxs.unprepare(masked, sparsifier)
    assert str(plain.graph) == str(program.graph)
    for fqn, tensor in program.state_dict.items():
        assert torch.equal(plain.state_dict[fqn], tensor)


def test_training_with_live_masks_keeps_zeros_and_compiles_once():
    model, inputs = make("sequential")
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, HALF)
    sparsifier.step()
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    compiled(*inputs).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(5):
            optimizer.zero_grad()
            compiled(*inputs).square().sum().backward()
            optimizer.step()
    model, record = fxs.squash(model, sparsifier)
    for fqn, mask in record.items():
        assert model.get_parameter(fqn)[~mask.keep].eq(0).all()
    assert isinstance(model[0].weight, nn.Parameter)


def test_offloaded_and_meta_models_are_mapped_and_masked_once_materialised():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, inputs = make("sequential")
    expected = list(fxs.find_weights(model, inputs))
    cpu_offload(model, execution_device="cpu")
    assert model[0].weight.is_meta
    assert list(fxs.find_weights(model, inputs)) == expected
    sparsifier = fxs.WeightNormSparsifier()
    sparsifier.prepare(copy.deepcopy(model).requires_grad_(False))
    with pytest.raises(MaskError, match=r"0.weight has no data yet"):
        sparsifier.step()
    remove_hook_from_submodules(model)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, HALF)
    sparsifier.step()
    assert sparsifier.get_mask("0.weight").sum() == 64


class Transposed(nn.Module):
    """A head that reads the embedding's memory through a parameter of its own."""

    def __init__(self, view):
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.head = nn.Parameter(view(self.embed.weight.data))

    def forward(self, tokens):
        return self.embed(tokens) @ self.head


@pytest.mark.parametrize("fqn", ["embed.weight", "head"])
@pytest.mark.parametrize("view", [torch.t, lambda w: w[:, 4:], lambda w: w.view(8, 8)])
def test_a_weight_that_shares_memory_with_another_parameter_is_refused(view, fqn):
    model, inputs = Transposed(view), (torch.tensor([[1, 3]]),)
    before, sparsifier = snapshot(model), fxs.WeightNormSparsifier()
    mapping = fxs.SparsityMapping().set_module_name(fqn, "unstructured 50%")
    other = "head" if fqn == "embed.weight" else "embed.weight"
    with pytest.raises(MaskError, match=f"{fqn} shares memory with {other}"):
        fxs.prepare(model, sparsifier, inputs, mapping)
    assert_unchanged(model, before)
    assert sparsifier.names == []


def test_neighbours_in_one_storage_are_no_matter():
    class Neighbours(nn.Module):
        def __init__(self):
            super().__init__()
            both = torch.randn(8, 8)
            self.left, self.right = (nn.Parameter(half) for half in both.chunk(2, 1))

        def forward(self, x):
            return x @ self.left + x @ self.right

    model, inputs = Neighbours(), (torch.randn(2, 8),)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, HALF)
    sparsifier.step()
    masked = model(*inputs)
    fxs.squash(model, sparsifier)
    assert torch.equal(model(*inputs), masked)


def test_a_loaded_program_with_masks_has_its_ties_again():
    model, inputs = make("tied")
    sparsifier = fxs.WeightNormSparsifier()
    program = torch.export.export(model, inputs, strict=False)
    masked = fxs.prepare(program, sparsifier, mapping=HALF)
    sparsifier.step()
    file = io.BytesIO()
    torch.export.save(masked, file)
    file.seek(0)
    loaded, again = torch.export.load(file), fxs.WeightNormSparsifier()
    fxs.prepare(loaded, again, mapping=HALF)
    plain, _ = fxs.squash(loaded, again)
    weight = plain.state_dict["head.weight"]
    assert torch.equal(weight, plain.state_dict["embed.weight"])
    assert torch.equal(weight == 0, ~sparsifier.get_mask("embed.weight"))


def test_a_detached_sparsifier_takes_a_graph():
    model, inputs = make("sequential")
    first, second = fxs.WeightNormSparsifier(), fxs.WeightNormSparsifier()
    fxs.prepare(as_exported(model, inputs), first, mapping=HALF)
    second.load_state_dict(first.state_dict())
    gm = as_exported(make("sequential")[0], inputs)
    fxs.prepare(gm, second, mapping=HALF)
    second.step()
    plain, _ = fxs.squash(gm, second)
    assert plain.get_parameter("0.weight").eq(0).sum() == 64


class Odd(nn.Module):
    """A parametrization whose output is its own."""

    def forward(self, weight):
        return weight.tanh()


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.spectral_norm,
        lambda layer: parametrize.register_parametrization(layer, "weight", Odd()),
    ],
)
def test_a_weight_on_which_no_mask_can_stand_stays_dense_unless_it_is_named(change, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), change(nn.Linear(8, 8)))
    x = (torch.randn(2, 8),)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, x, "2:4")
    sparsifier.step()
    assert list(sparsifier.names) == ["0.weight"]
    assert "1.weight stays dense: no mask can stand on it: 1.weight is already parametrized" in (
        caplog.text
    )
    fxs.unprepare(model, sparsifier)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskError, match=r"1\.weight is already parametrized"):
        fxs.prepare(model, sparsifier, x, {"module_name": {"1": "2:4"}})
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    method = fxs.WandaSparsifier()
    _, report = fxs.prune(model, method, [x], "2:4")
    assert list(report) == ["0.weight"]
    assert "is already parametrized" in report.dense["1.weight"]


def test_weight_norms_are_masked_beneath_the_norm():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (torch.randn(2, 8),), "2:4")
    sparsifier.step()
    assert int((model[0].weight == 0).sum()) == 32
