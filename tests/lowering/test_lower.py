import copy
import json
import pickle
import warnings

import expecttest
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fx_sparsity as fxs
from fx_sparsity.graph import InputError
from fx_sparsity.kernels import SparseLinear
from fx_sparsity.lowering import (
    LoweredWeight,
    LoweringError,
    LoweringReport,
    lower,
    policy,
    timing,
    unlower,
)
from fx_sparsity.lowering.lowered import ByTokens
from fx_sparsity.quantization import pt2e, sparsify_and_quantize
from fx_sparsity.verification import SparsityLostError, read_weights
from tests.models import TiedLanguageModel, make_bert

MAPPING = fxs.SparsityMapping().set_global("unstructured 60%")
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    """What is measured here is nobody's business; the compiled kernels stay where they are."""
    monkeypatch.setattr(timing, "folders", lambda: [tmp_path])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def prune_(model, level=0.6):
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for name in ("weight", "in_proj_weight"):
            weight = getattr(module, name, None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 2:
                weight.data[torch.rand(weight.shape, generator=generator) < level] = 0
    return model


def dense(dtype=torch.float32):
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)).eval().to(dtype)
    )


def sparse(dtype=torch.float32):
    return prune_(dense(dtype))


def assert_same(lowered, model, *inputs, scale=1.0):
    """Equal but for the rounding of one dtype: sums may be taken in another order."""
    expected, found = model(*inputs), lowered(*inputs)
    assert found.dtype == expected.dtype
    step = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=8 * step, atol=scale * 8 * step)


def quantized(backend, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, verification = sparsify_and_quantize(
            dense(),
            fxs.WeightNormSparsifier(),
            (X,),
            order="sparsify_first",
            backend=backend,
            mapping=MAPPING,
            **kwargs,
        )
    verification.raise_if_lost()
    return model


def torchao_model(config, dtype):
    from torchao.quantization import quantize_

    model = sparse(dtype)
    quantize_(model, config)
    return model


def int8(name, dtype=torch.float32):
    import torchao.quantization as ao

    return torchao_model(getattr(ao, name)(), dtype)


def fx_dynamic():
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig

    return quantized("fx", config=QConfigMapping().set_global(default_dynamic_qconfig))


FLOWS = {
    "float": sparse,
    "bfloat16": lambda: sparse(torch.bfloat16),
    "torchao int8 weight-only": lambda: int8("Int8WeightOnlyConfig"),
    "torchao int8 weight-only, bfloat16": lambda: int8("Int8WeightOnlyConfig", torch.bfloat16),
    "torchao int8 dynamic": lambda: int8("Int8DynamicActivationInt8WeightConfig"),
    "torchao int8 dynamic, bfloat16": lambda: int8(
        "Int8DynamicActivationInt8WeightConfig", torch.bfloat16
    ),
    "eager dynamic": lambda: quantized("eager"),
    "fx dynamic": fx_dynamic,
    "pt2e dynamic": lambda: quantized("pt2e"),
    "pt2e static": lambda: quantized("pt2e", config=pt2e.default_quantizer(dynamic=False)),
    "export": lambda: torch.export.export(sparse(), (X,)).module(),
    "decomposed": lambda: torch.export.export(sparse(), (X,)).run_decompositions().module(),
    "traced": lambda: torch.fx.symbolic_trace(sparse()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow_lowers_to_the_same_outputs_and_back(flow):
    model = FLOWS[flow]()
    x = X.bfloat16() if "bfloat16" in flow else X
    before = model(x)
    lowered, report = lower(copy.deepcopy(model), (x,), "always")
    assert report.lowered == ("0.weight", "2.weight"), report
    assert report.bytes_after < report.bytes_before
    # Weight-only layers of torchao round products to bfloat16 before they scale them.
    assert_same(lowered, model, x, scale=4.0 if "bfloat16" in flow else 1.0)
    assert torch.equal(model(x), before)
    assert sum(isinstance(module, SparseLinear) for module in lowered.modules()) == 2
    back = unlower(lowered)
    assert not any(isinstance(module, SparseLinear) for module in back.modules())
    assert torch.equal(back(x), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flow", ["float", "torchao int8 dynamic", "eager dynamic"])
def test_unlower_gives_back_class_codes_and_zeros(flow):
    model = FLOWS[flow]()
    lowered, _ = lower(copy.deepcopy(model), None, "always")
    lowered = copy.deepcopy(lowered)
    back = unlower(lowered)
    for old, new in zip(model.modules(), back.modules(), strict=True):
        assert type(old) is type(new)
    stored = {w.where: w for w in read_weights(model)}
    for found in read_weights(back):
        assert torch.equal(found.data, stored[found.where].data)
        if found.scale is not None:
            assert torch.equal(found.scale, stored[found.where].scale)


def test_negative_zeros_come_back_positive():
    model = sparse()
    model[0].weight.data[model[0].weight == 0] = -0.0
    expected = torch.where(model[0].weight == 0, 0.0, model[0].weight)
    back = unlower(lower(model, (X,), "always")[0])
    assert torch.equal(back[0].weight.view(torch.int32), expected.view(torch.int32))


def test_a_program_is_lowered_in_a_copy_saved_and_loaded(tmp_path):
    model = sparse()
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (X,), dynamic_shapes=shapes)
    names = set(program.state_dict)
    lowered, report = lower(program, policy="always")
    assert report.lowered == ("0.weight", "2.weight")
    assert set(program.state_dict) == names
    assert_same(program.module(), model, X)
    assert not any(name.endswith("weight") for name in lowered.state_dict)
    torch.export.save(lowered, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for x in (X, torch.randn(9, 64)):
        assert_same(lowered.module(), model, x)
        assert_same(loaded, model, x)


def test_a_lowered_model_exports_and_compiles_once_more_at_most():
    model = sparse()
    lowered, _ = lower(copy.deepcopy(model), (X,), "always")
    program = torch.export.export(lowered, (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowered, backend=counter, fullgraph=True)
    for tokens in (1, 4, 16, 64):
        x = torch.randn(tokens, 64)
        assert_same(program.module(), model, x)
        assert_same(compiled, model, x)
    assert counter.frame_count <= 2


@pytest.mark.exhaustive
def test_an_aot_inductor_package_of_a_lowered_model(tmp_path):
    model = sparse()
    lowered, _ = lower(copy.deepcopy(model), (X,), "always")
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(lowered, (X,)), package_path=str(tmp_path / "model.pt2")
    )
    assert_same(torch._inductor.aoti_load_package(package), model, X)


def test_state_dicts_round_trip():
    lowered, _ = lower(sparse(), (X,), "always")
    other, _ = lower(prune_(dense(), 0.3), (X,), "always")
    other.load_state_dict(lowered.state_dict())
    assert torch.equal(other(X), lowered(X))


def test_transposed_storage():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = prune_(nn.Sequential(Conv1D(32, 64), nn.ReLU()).eval())
    lowered, report = lower(copy.deepcopy(model), (X,), "always")
    assert report["0.weight"].kernel == "bitmask"
    assert_same(lowered, model, X)
    back = unlower(lowered)
    assert type(back[0]) is Conv1D
    assert torch.equal(back[0].weight, model[0].weight)


def test_a_transformer_with_keyword_inputs():
    model, inputs = make_bert()
    prune_(model)
    expected = model(**inputs).last_hidden_state
    lowered, report = lower(copy.deepcopy(model), inputs, "always")
    assert len(report.lowered) == 12
    torch.testing.assert_close(lowered(**inputs).last_hidden_state, expected)


def test_rules_by_class_hold_for_nodes_too():
    program = torch.export.export(sparse(), (X,))
    _, report = lower(program, policy={nn.Linear: "always", "2": None})
    assert report.lowered == ("0.weight",)
    assert report["2.weight"].reason == "excluded by name '2'"


def test_a_tied_head_is_lowered_and_the_table_stays():
    torch.manual_seed(0)
    model = prune_(TiedLanguageModel().eval())
    tokens = torch.randint(32, (2, 5))
    expected = model(tokens)
    lowered, report = lower(model, (tokens,), {nn.Linear: "always", nn.Embedding: None})
    assert isinstance(lowered.head, SparseLinear)
    torch.testing.assert_close(lowered(tokens), expected)
    table = 32 * 8 * 4
    rows = [report["head.weight"], report["embed.weight"]]
    assert sum(row.bytes_before for row in rows) == table
    assert report["embed.weight"].bytes_after == table
    assert report.notes == (
        "tied, each in a form of its own: embed.weight dense; head.weight bitmask",
    )
    back = unlower(lowered)
    assert back.head.weight is back.embed.weight


def test_shared_and_tied_layers_are_packed_once():
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    model = prune_(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(64, 64)).eval())
    model[3].weight = shared.weight
    expected = model(X)
    lowered, report = lower(model, (X,), "always")
    assert lowered[0] is lowered[2]
    assert lowered[3].parts().keys() == lowered[0].parts().keys()
    assert all(lowered[3].parts()[name] is part for name, part in lowered[0].parts().items())
    torch.testing.assert_close(lowered(X), expected)
    assert (report["3.weight"].bytes_before, report["3.weight"].bytes_after) == (0, 0)
    assert report.notes == ("tied, sharing what was packed: 0.weight, 2.weight, 3.weight",)
    back = unlower(lowered)
    assert back[0] is back[2]
    assert back[3].weight is back[0].weight


class Zoo(nn.Module):
    """What is no plain linear layer."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.own = Doubled(16, 16)
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda module, args, result: result + 1)
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.read = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.halved = nn.Linear(16, 16).half()
        self.conv = nn.Conv1d(16, 16, 1)
        self.bare = nn.Parameter(torch.randn(16, 16))
        self.experts = nn.Parameter(torch.randn(2, 16, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.hooked(self.own(self.plain(x))) + self.normed(x)
        x = self.halved(x.half()).float() + F.linear(x, self.read.weight) + x @ self.bare
        x = x + torch.bmm(x.expand(2, -1, -1), self.experts).sum(0)
        return self.attention(x, x, x)[0] + self.conv(x.mT).mT


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Expected(expecttest.TestCase):
    maxDiff = None

    def test_nothing_is_skipped_silently(self):
        torch.manual_seed(0)
        model = prune_(Zoo().eval(), 0.75)
        x = torch.randn(1, 3, 16)
        with torch.no_grad():
            expected = model(x)
            lowered, report = lower(model, (x,), "always")
            torch.testing.assert_close(lowered(x), expected)
        self.assertExpectedInline(
            str(report),
            """\
lowered       pattern             density  kernel   gain at tokens  bytes before  after
------------  ------------------  -------  -------  --------------  ------------  -----
plain.weight  unstructured 71.9%  28.1%    bitmask  not measured            1024    400

stays dense                pattern             density  reason
-------------------------  ------------------  -------  ----------------------------------------------------
own.weight                 -                   -        Doubled has a forward of its own
hooked.weight              -                   -        it has hooks
normed.weight              -                   -        its weight is computed anew at each call
read.weight                unstructured 73.4%  26.6%    the model's own code reads its weight
unused.weight              unstructured 75.4%  24.6%    example_inputs never reach it
halved.weight              4:8                 25.0%    no kernel for inputs of torch.float16
attention.out_proj.weight  -                   -        its weight is read by the module around it
bare                       -                   100.0%   no module or node that lowering replaces holds it
experts                    -                   100.0%   no kernel for weights of kind matmul in 3 dimensions
conv.weight                -                   100.0%   no kernel for weights of kind conv in 3 dimensions
attention.in_proj_weight   unstructured 76.6%  23.4%    no module or node that lowering replaces holds it

1 of 12 weights lowered; 0.0132 MiB of weights before, 0.0126 MiB after""",
        )

    def test_the_report_of_measured_layers(self):
        row = LoweredWeight
        report = LoweringReport(
            (
                row("a.weight", "2:4", 0.5, "bitmask", {1: 1.93, 4: 1.5}, None, 4096, 2304, ""),
                row("b.weight", "2:4", 0.5, "bitmask", {1: 1.93, 64: 0.5}, 1, 4096, 6400, ""),
                row("c.weight", None, 1.0, None, {}, None, 4096, 4096, "not sparse enough"),
            )
        )
        self.assertExpectedInline(
            str(report),
            """\
lowered   pattern  density  kernel                  gain at tokens         bytes before  after
--------  -------  -------  ----------------------  ---------------------  ------------  -----
a.weight  2:4      50.0%    bitmask                 1.9x at 1, 1.5x at 4           4096   2304
b.weight  2:4      50.0%    bitmask up to 1 tokens  1.9x at 1, 0.5x at 64          4096   6400

stays dense  pattern  density  reason
-----------  -------  -------  -----------------
c.weight           -  100.0%   not sparse enough

2 of 3 weights lowered; 0.0117 MiB of weights before, 0.0122 MiB after""",
        )
        read = json.loads(json.dumps(report.to_dict()))
        assert read["rows"][0]["gain"] == {"1": 1.93, "4": 1.5}


def pruned_rows(module):
    with torch.no_grad():
        module.weight[::2] = 0
    return module.eval()


TABLES = {
    "embedding": lambda: nn.Embedding(100, 16, padding_idx=3),
    "bfloat16": lambda: nn.Embedding(100, 16).bfloat16(),
    "bag of sums": lambda: nn.EmbeddingBag(100, 16, mode="sum"),
    "bag of means": lambda: nn.EmbeddingBag(100, 16, mode="mean", padding_idx=5),
    "bag of maxima": lambda: nn.EmbeddingBag(100, 16, mode="max"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_tables_lose_their_zero_rows(table, coded):
    torch.manual_seed(0)
    model = nn.Sequential(pruned_rows(TABLES[table]()))
    if coded:
        model = fxs.post_training_sparse_quantize(
            model,
            fxs.DataNormSparsifier,
            sparsify_first=True,
            sparsity_level=0.5,
            sparse_block_shape=(1, 16),
        )
    tokens = torch.randint(100, (4, 6))
    expected = model(tokens)
    lowered, report = lower(copy.deepcopy(model), (tokens,), "always")
    assert report["0.weight"].kernel == "rows"
    assert report["0.weight"].bytes_after < report["0.weight"].bytes_before
    torch.testing.assert_close(lowered(tokens), expected)
    back = unlower(lowered)
    torch.testing.assert_close(back(tokens), expected)
    if not coded:
        assert type(back[0]) is type(model[0])
        assert torch.equal(back[0].weight, model[0].weight)


def test_auto_measures_tables_too(table):
    table |= {(100, 24): timed(0.5)}
    model = nn.Sequential(pruned_rows(nn.Embedding(100, 16)))
    _, report = lower(model, (torch.randint(100, (4, 6)),))
    assert report["0.weight"].reason.startswith("not faster here: rows at 24 tokens 0.5x")
    table |= {(100, 24): timed(1.5)}
    _, report = lower(model, (torch.randint(100, (4, 6)),))
    assert report["0.weight"].kernel == "rows"


def test_bad_rules_change_nothing():
    model = sparse()
    modules = list(model)
    for rule, message in (
        ("fastest", "policy: expected 'auto', 'always', 'bitmask'"),
        ({"3": "always"}, "'3' names no layer"),
        ({"0": "brotli"}, "found 'brotli'"),
    ):
        with pytest.raises(LoweringError, match=message):
            lower(model, (X,), rule)
    with pytest.raises(LoweringError, match=r"tokens: expected positive integers, found \(0,\)"):
        lower(model, (X,), tokens=(0,))
    with pytest.raises(InputError):
        lower(model, (X[:, :3],))
    half = sparse().half()
    with pytest.raises(LoweringError, match=r"0.weight: packing 'bitmask' cannot hold it"):
        lower(half, None, {"0": "bitmask"})
    assert list(model) == modules


def test_masked_models_are_refused():
    model = dense()
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (X,), MAPPING)
    with pytest.raises(LoweringError, match=r"0.weight, 2.weight still masked: squash"):
        lower(model, (X,))


def test_a_weight_that_left_its_mask_is_refused():
    model = dense()
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (X,), MAPPING)
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    lower(copy.deepcopy(model), (X,), "always", record=record)
    model[0].weight.data[model[0].weight == 0] = 1e-3
    with pytest.raises(SparsityLostError, match=r"0.weight: \d+ of \d+ zeros lost"):
        lower(model, (X,), "always", record=record)
    assert isinstance(model[0], nn.Linear)


def test_a_model_that_does_not_run_lowered_is_put_back():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 32)

        def forward(self, x):
            if type(self.layer).__name__ == "LoweredLinear":
                raise RuntimeError("what is that?")
            return self.layer(x)

    model = prune_(Asks().eval())
    layer = model.layer
    with pytest.raises(LoweringError, match="does not run when it is lowered: .*what is that"):
        lower(model, (X,), "always")
    assert model.layer is layer


def test_a_root_is_replaced_in_what_is_returned():
    layer = prune_(nn.Linear(64, 32).eval())
    lowered, report = lower(layer, (X,), "always")
    assert isinstance(lowered, SparseLinear)
    assert report.lowered == ("weight",)
    assert_same(lowered, layer, X)
    assert torch.equal(unlower(lowered).weight, layer.weight)


def timed(gain, at_least=None):
    low = gain if at_least is None else at_least
    return timing.Timing("eager", 100.0, 100.0 / gain, gain, low)


@pytest.fixture
def table(monkeypatch):
    """A fake table: (outputs, tokens) -> timing; what is not in it fails the test."""
    entries = {}

    def measure(layer, packed, tokens, **rest):
        return {name: {n: entries[layer.shape[0], n] for n in tokens} for name in packed}

    monkeypatch.setattr(timing, "measure", measure)
    return entries


def test_auto_lowers_only_what_measured_faster_beyond_the_noise(table):
    table |= {(48, 5): timed(1.4, 1.2), (32, 5): timed(1.1, 0.97)}
    lowered, report = lower(sparse(), (X,))
    assert report.lowered == ("0.weight",)
    assert report["0.weight"].gain == {5: 1.4}
    assert report["2.weight"].reason == (
        "not faster here: bitmask at 5 tokens 1.1x, at least 0.97x of dense (eager)"
    )
    assert isinstance(lowered[2], nn.Linear)


def test_auto_wants_all_numbers_of_tokens_to_be_faster(table):
    table |= {(n, t): timed(2.0 if t < 16 else 0.8) for n in (48, 32) for t in (1, 4, 16)}
    _, report = lower(sparse(), (X,), tokens=(16, 1, 4))
    assert report.lowered == ()
    assert "16 tokens 0.8x" in report["0.weight"].reason
    _, report = lower(sparse(), (X,), tokens=(4, 1))
    assert report.lowered == ("0.weight", "2.weight")


def test_both_forms_may_be_kept(table):
    table |= {(n, t): timed(2.0 if t < 16 else 0.8) for n in (48, 32) for t in (1, 4, 16)}
    model = sparse()
    lowered, report = lower(copy.deepcopy(model), (X,), tokens=(1, 4, 16), keep_dense=True)
    row = report["0.weight"]
    assert (row.up_to, row.bytes_after > row.bytes_before) == (4, True)
    assert isinstance(lowered[0], ByTokens)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowered, backend=counter, fullgraph=True, dynamic=True)
    calls = []
    watched = copy.deepcopy(lowered)
    watched[0].packed.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    for tokens in (1, 2, 3, 4, 5, 16, 64):
        x = torch.randn(tokens, 64)
        assert_same(watched, model, x)
        assert_same(compiled, model, x)
    assert set(calls) == {1, 2, 3, 4}
    assert counter.frame_count <= 3  # one token, some, many
    assert torch.equal(unlower(lowered)(X), model(X))


def test_the_most_specific_rule_wins():
    rules = policy.Policy(
        {"a.b": "bitmask", "re:a.*": None, nn.Linear: "always", nn.Module: "auto"}
    )
    assert rules.rule(("a.b.weight",), nn.Linear)[0] == "bitmask"
    assert rules.rule(("a.c.weight",), nn.Linear) == (None, "excluded by regex 'a.*'")
    assert rules.rule(("c.weight",), Doubled)[0] == "always"
    assert rules.rule(("c.weight",), nn.Conv2d)[0] == "auto"
    assert rules.unused() == []
    assert policy.Policy({"x": None}).rule(("y.weight",), nn.Linear) == (None, "no rule names it")


def test_a_program_has_no_way_back():
    program = torch.export.export(sparse(), (X,))
    lowered, _ = lower(program, policy="always")
    for subject in (lowered, program):
        with pytest.raises(
            LoweringError, match="expected a module, found an ExportedProgram.*keep"
        ):
            unlower(subject)


def test_a_lowered_model_is_not_saved_for_what_cannot_load_it(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 100}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    model, inputs = transformers.LlamaForCausalLM(config).eval(), (torch.arange(8).view(1, 8),)
    mapping = fxs.SparsityMapping().set_object_type(nn.Linear, "2:4")
    method = fxs.MagnitudeSparsifier()
    fxs.prune(model, method, [inputs], mapping)
    model, _ = fxs.squash(model, method)
    dense = copy.deepcopy(model)
    lowered, _ = fxs.lower(model, inputs, policy="always")
    with pytest.raises(LoweringError, match=r"LlamaForCausalLM is lowered.*call unlower\(model\)"):
        copy.deepcopy(lowered).save_pretrained(tmp_path / "hub")
    with pytest.raises(LoweringError, match="LlamaForCausalLM is lowered"):
        pickle.loads(pickle.dumps(lowered)).save_pretrained(tmp_path / "hub")
    fxs.save(dense, tmp_path / "dense.safetensors")
    sparse = copy.deepcopy(dense)
    fxs.load_sparse(tmp_path / "dense.safetensors", sparse)
    with pytest.raises(LoweringError, match="LlamaForCausalLM is lowered"):
        sparse.save_pretrained(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    fxs.save(lowered, tmp_path / "lowered.safetensors")
    for load in (fxs.load, fxs.load_sparse):
        with pytest.raises(RuntimeError, match="The file is of a lowered model. Lower this one"):
            load(tmp_path / "lowered.safetensors", copy.deepcopy(dense))
    fxs.load(tmp_path / "lowered.safetensors", lowered)
    fxs.unlower(lowered).save_pretrained(tmp_path / "hub")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hub")
    assert again.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
