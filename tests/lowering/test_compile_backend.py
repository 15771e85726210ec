import copy
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fx_sparsity as fxs
from fx_sparsity.kernels import SparseLinear
from fx_sparsity.lowering import compile_backend as compiling
from fx_sparsity.lowering import timing
from fx_sparsity.lowering.compile_backend import backend
from fx_sparsity.masks.engine import compute_mask
from tests.models import Delegating

ROOT = Path(__file__).parents[2]
MAPPING = fxs.SparsityMapping().set_global("unstructured 60%").set_module_name("last", "2:4")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(timing, "folders", lambda: [tmp_path])
    monkeypatch.setattr(compiling, "inductor", lambda: lambda graph, inputs, **_: graph.forward)
    with torch.no_grad():
        yield


class Model(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 16)
        self.breaks = breaks

    def forward(self, x):
        x = self.first(x).relu()
        if self.breaks:
            torch._dynamo.graph_break()
        return self.last(self.middle(x).relu())


def masked(model, x, mapping=MAPPING):
    """The oracle: the same mapping through `prepare` and `squash`."""
    model, sparsifier = copy.deepcopy(model), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (x,), mapping)
    sparsifier.step()
    return fxs.squash(model, sparsifier)[0]


@pytest.fixture
def masks(monkeypatch):
    """The weights that masks are computed of."""
    seen = []

    def counting(weight, *args, **kwargs):
        seen.append(weight.data_ptr())
        return compute_mask(weight, *args, **kwargs)

    monkeypatch.setattr(compiling, "compute_mask", counting)
    return seen


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def test_through_inductor_in_one_graph(monkeypatch):
    monkeypatch.undo()
    reports = []
    model = Model().eval()
    options = {"mapping": MAPPING, "policy": "always", "report": reports.append}
    compiled = torch.compile(model, backend=backend, fullgraph=True, options=options)
    torch.testing.assert_close(compiled(X), masked(model, X)(X))
    (report,) = reports
    assert set(report.lowered) == {"first.weight", "middle.weight", "last.weight"}
    assert report["last.weight"].pattern == "2:4"
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


@pytest.mark.parametrize("policy", ["always", {nn.Module: None}])
def test_masks_are_computed_once_a_parameter(masks, policy):
    reports = []
    model = Model(breaks=True).eval()
    options = {"mapping": MAPPING, "policy": policy, "report": reports.append}
    compiled = torch.compile(model, backend=backend, options=options)
    oracle = masked(model, X)
    for tokens in (5, 1, 9, 64):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), oracle(x))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(X), oracle(X))
    assert len(reports) >= 4  # two graphs, again for other sizes, and again after the reset
    assert sorted(masks) == sorted({p.data_ptr() for p in model.parameters() if p.ndim == 2})
    with torch.no_grad():
        model.first.weight.mul_(-2.0)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(X), masked(model, X)(X))
    assert len(masks) == 4


def test_all_graphs_share_what_was_packed():
    model = Model().eval()
    for _ in range(2):
        torch._dynamo.reset()
        options = {"mapping": MAPPING, "policy": "always"}
        torch.compile(model, backend=backend, options=options)(X)
    known = compiling._KNOWN[model.first.weight]
    assert len(known._packed) == 1
    assert not known._dense


def test_a_sparse_model_needs_no_mapping():
    model = masked(Model().eval(), X)
    reports = []
    compiled = torch.compile(
        model, backend=backend, options={"policy": "always", "report": reports.append}
    )
    torch.testing.assert_close(compiled(X), model(X))
    assert len(reports[0].lowered) == 3


def compile_with(compiled, reports=None, /, *, policy="always", **options):
    """A model behind the backend, which appends its reports to a list."""
    report = [].append if reports is None else reports.append
    options |= {"policy": policy, "report": report}
    return torch.compile(compiled, backend=backend, options=options)


def test_names_count_from_the_compiled_module():
    mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    for make, fqn in [
        (Delegating, "net.0.weight"),
        (lambda net: Delegating(Delegating(net)), "net.net.0.weight"),
        (nn.DataParallel, "module.0.weight"),
        (lambda net: nn.Sequential(torch.compile(net)), "0._orig_mod.0.weight"),
        (lambda net: nn.ModuleList([Delegating(net)])[0], "net.0.weight"),
    ]:
        reports = []
        mapping = {"module_name": {fqn.removesuffix(".weight"): "2:4"}}
        module = make(mlp).eval()
        x = torch.randn(3, 32)
        result = compile_with(module, reports, mapping=mapping)(x)
        (report,) = reports
        assert report[fqn].density == 0.5
        assert report.lowered == (fqn,)
        torch.testing.assert_close(result, masked(mlp, x, {"module_name": {"0": "2:4"}})(x))


@pytest.mark.parametrize("eager_outer", [True, False])
def test_names_of_submodules_behind_graph_breaks(masks, eager_outer):
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    reports = []
    inner = Model(breaks=True).eval()
    middle = "middle" if eager_outer else "inner.middle"
    options = {"mapping": {"module_name": {middle: "unstructured 50%"}}}
    if eager_outer:
        model = Around(compile_with(inner, reports, **options))
    else:
        model = compile_with(Around(inner), reports, **options)
    model(X)
    assert {name for r in reports for name in r.lowered} == {f"{middle}.weight"}
    assert len(reports) == 2
    assert reports[-1].notes == ()


def test_classes_of_modules_are_known(masks):
    reports = []
    mapping = fxs.SparsityMapping().set_object_type(nn.Linear, "2:4")
    compile_with(Model(breaks=True).eval(), reports, mapping=mapping)(X)
    assert sum(len(report.lowered) for report in reports) == 3


class Tied(nn.Module):
    """A table that another graph multiplies with; in torch's order, the head comes first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.table = nn.Linear(32, 64, bias=False), nn.Embedding(64, 32)
        self.middle = nn.Linear(32, 32)
        self.head.weight = self.table.weight

    def forward(self, x):
        x = self.middle(self.table(x))
        torch._dynamo.graph_break()
        return self.head(x)


INDICES = torch.arange(12).reshape(3, 4)


BY_KIND = [
    {"object_type": {"linear": "2:4", "embedding": None}},
    {"object_type": {"embedding": "unstructured 50%"}},
    {"global": "unstructured 50%", "module_name_regex": {"table": None}},
]
BY_ALIAS = [
    {"module_name": {"table": "2:4"}},
    {"module_name": {"head.weight": "unstructured 50%"}},
    {"global": "2:4", "module_name_regex": {"head": None}},
]


@pytest.mark.parametrize(
    ("way", "mapping"),
    [
        *(("function", mapping) for mapping in BY_KIND),  # no graph of it tells aliases
        *((way, m) for way in ("module", "method", "given") for m in BY_KIND + BY_ALIAS),
    ],
)
def test_a_weight_of_several_graphs_is_what_its_first_use_says(way, mapping):
    model = Tied().eval()
    expected = masked(model, INDICES, mapping)(INDICES)
    options = {"mapping": mapping} | ({"model": model} if way == "given" else {})

    def function(x):
        return model(x)

    given = {"module": model, "method": model.forward}.get(way, function)
    call = compile_with(given, **options)
    torch.testing.assert_close(call(INDICES), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(call(INDICES[:1]), expected[:1])


def test_one_module_may_be_compiled_with_several_mappings():
    model = Tied().eval()
    mappings = ["2:4", {"object_type": {"linear": "2:4"}}, {"object_type": {"embedding": "1:4"}}]
    calls = [compile_with(model, mapping=mapping) for mapping in mappings]
    for _ in range(2):
        for call, mapping in zip(calls, mappings, strict=True):
            expected = masked(model, INDICES, mapping)(INDICES)
            torch.testing.assert_close(call(INDICES), expected)
    changed = fxs.SparsityMapping().set_global("2:4")
    compile_with(model, mapping=changed)(INDICES)
    changed.set_global("unstructured 90%")
    torch._dynamo.reset()
    result = compile_with(model, mapping=changed)(INDICES)
    torch.testing.assert_close(result, masked(model, INDICES, changed)(INDICES))


def test_entries_that_match_nothing_are_told(caplog):
    reports = []
    mapping = (
        fxs.SparsityMapping()
        .set_module_name("last", "2:4")
        .set_module_name("lost", "2:4")
        .set_module_name_regex("first", "2:4")
        .set_module_name_regex("fisrt", "2:4")
        .set_object_type("linear", None)
        .set_object_type("conv", "2:4")
    )
    compile_with(Model(breaks=True).eval(), reports, mapping=mapping)(X)
    first, last = (report.notes for report in reports)
    assert first == (
        "no weight of any graph so far matches name 'last', name 'lost', regex 'fisrt', type 'conv'",
        "in no graph so far, and dense where they are used: middle.weight, last.weight",
    )
    assert last == (
        "no weight of any graph so far matches name 'lost', regex 'fisrt', type 'conv'",
    )
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [*first, *last] == warned


class Skipped(nn.Module):
    """Dynamo runs its loop and its recurrent layer eagerly, and compiles what the loop calls."""

    def __init__(self):
        super().__init__()
        self.rnn, self.looped = nn.LSTM(32, 32), nn.Linear(32, 32)
        self.block = Delegating(nn.Sequential(nn.Linear(32, 32), nn.ReLU()))

    def forward(self, x):
        x = self.rnn(x)[0]
        for _ in range(2):
            x = self.block(self.looped(x))
            torch._dynamo.graph_break()
        return x


def test_weights_of_frames_that_dynamo_skips_are_told():
    reports = []
    mapping = {"module_name": {"block.net.0": "2:4"}, "module_name_regex": {"rnn|looped": "2:4"}}
    compile_with(Skipped().eval(), reports, mapping=mapping)(X)
    (report,) = reports
    assert report.lowered == ("block.net.0.weight",)
    assert report.notes == (
        "no weight of any graph so far matches regex 'rnn|looped'",
        "in no graph so far, and dense where they are used: "
        "rnn.weight_ih_l0, rnn.weight_hh_l0, looped.weight",
    )


@pytest.mark.parametrize("edit", [lambda w: w.mul_(-1).roll(1), lambda w: w.data.copy_(w.flip(1))])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_edits_are_seen_by_the_next_compilation(edit, mode):
    """Also those that no version counts: through `.data`, and of inference tensors."""
    with mode():
        model = Model().eval()
        for _ in range(3):
            torch._dynamo.reset()
            expected = masked(model, X)(X)
            torch.testing.assert_close(compile_with(model, mapping=MAPPING)(X), expected)
            edit(model.first.weight)
            edit(model.last.weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_made_under_inference_mode(masks, mode):
    with torch.inference_mode():
        model = Model(breaks=True).eval()
        expected = masked(model, X)(X)
    with mode():
        call = compile_with(model, mapping=MAPPING)
        torch.testing.assert_close(call(X), expected)
        torch.testing.assert_close(call(torch.cat([X, X]))[:5], expected)
        lowered, _ = fxs.lower(copy.deepcopy(model), (X,), policy={nn.Module: "bitmask"})
        torch.testing.assert_close(lowered(X), model(X))
    assert len(masks) == 3


@pytest.mark.parametrize("policy", ["always", {nn.Module: None}])
def test_a_function_may_call_modules_with_the_same_names(policy):
    modules = [nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(16, 32)]

    def function(x):
        for module in modules:
            x = module(x)
        return x

    reports = []
    result = compile_with(function, reports, policy=policy, mapping="2:4")(X)
    torch.testing.assert_close(result, masked(nn.Sequential(*modules), X, "2:4")(X))
    assert len(reports[0]) == 3


@pytest.mark.parametrize("policy", ["always", {nn.Module: None}])
def test_names_that_differ_by_a_dot_alone(policy):
    class Close(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b, self.a = nn.Linear(32, 32), nn.ModuleDict({"b": nn.Linear(32, 32)})

        def forward(self, x):
            return self.a["b"](self.a_b(x))

    model = Close().eval()
    result = compile_with(model, policy=policy, mapping="2:4")(X)
    torch.testing.assert_close(result, masked(model, X, "2:4")(X))


def test_weights_beneath_masks_are_named_as_without():
    model, sparsifier = Model().eval(), fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (X,), MAPPING)
    sparsifier.step()
    reports = []
    result = compile_with(model, reports, mapping=MAPPING)(X)
    torch.testing.assert_close(result, model(X))
    assert set(reports[0]) == {"first.weight", "middle.weight", "last.weight"}


def test_adapters_of_peft(monkeypatch):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    targets = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama, targets).eval()
    reports = []
    down = "base_model.model.model.layers.1.mlp.down_proj"
    base = r".*q_proj\.base_layer"
    mapping = {"module_name": {down: "2:4"}, "module_name_regex": {base: "unstructured 50%"}}
    inputs = {"input_ids": INDICES, "use_cache": False}
    result = compile_with(model, reports, mapping=mapping)(**inputs).logits
    densities = {fqn: row.density for report in reports for fqn, row in report.items()}
    parameters = {fqn for fqn, p in model.named_parameters() if p.ndim == 2}
    assert densities.keys() == parameters
    sparse = {fqn for fqn in parameters if fqn.startswith(down) or "base_layer" in fqn}
    assert len(sparse) == 3
    assert {fqn for fqn, density in densities.items() if density == 0.5} == sparse
    assert reports[-1].notes == ()
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, inputs, mapping)
    sparsifier.step()
    fxs.squash(model, sparsifier)
    torch.testing.assert_close(result, model(**inputs).logits)


def test_quantized_weights_are_lowered():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = masked(Model().eval(), X)
    quantize_(model, Int8WeightOnlyConfig())
    expected = model(X)
    reports = []
    options = {"policy": "always", "report": reports.append}
    compiled = torch.compile(model, backend=backend, options=options)
    torch.testing.assert_close(compiled(X), expected)
    assert len(reports[0].lowered) == 3


def test_gradients_are_refused():
    compiled = torch.compile(Model(), backend=backend)
    with (
        torch.enable_grad(),
        pytest.raises(Exception, match=r"call the compiled\s+model under torch.inference_mode"),
    ):
        compiled(X)


def test_unknown_options_are_refused():
    compiled = torch.compile(Model().eval(), backend=backend, options={"freezing": True})
    with pytest.raises(Exception, match="unknown key 'freezing'; expected mapping, policy"):
        compiled(X)


def test_options_go_on_to_inductor(monkeypatch):
    seen = {}

    def inductor(graph, inputs, **kwargs):
        seen.update(kwargs)
        return graph.forward

    monkeypatch.setattr(compiling, "inductor", lambda: inductor)
    torch.compile(Model().eval(), backend=backend, options={"inductor": {"freezing": True}})(X)
    assert seen == {"config_patches": {"freezing": True}}


@pytest.mark.parametrize("then", ["eager", "aot_eager", lambda graph, inputs: graph.forward])
def test_another_backend_may_follow(then):
    reports = []
    compiled = compile_with(Model().eval(), reports, mapping=MAPPING, then=then)
    torch.testing.assert_close(compiled(X), masked(Model().eval(), X)(X))
    assert len(reports[0].lowered) == 3


def test_two_backends_do_not_follow():
    compiled = compile_with(Model().eval(), then="eager", inductor={"freezing": True})
    with pytest.raises(Exception, match="'then' takes its place; leave one out"):
        compiled(X)
    with pytest.raises(fxs.FxSparsityError, match="a mode is for Inductor"):
        backend(fx.symbolic_trace(Model()), (X,), options={"then": "eager"}, mode="reduce-overhead")


def test_a_mode_goes_on_to_inductor(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        compiling,
        "inductor",
        lambda: lambda graph, inputs, **kwargs: seen.update(kwargs) or graph.forward,
    )
    torch.compile(Model().eval(), backend=backend, mode="reduce-overhead")(X)
    assert seen == {"config_patches": torch._inductor.list_mode_options("reduce-overhead")}


def test_torch_finds_the_backend_by_its_entry_point(tmp_path):
    """With the metadata that this pyproject gives an installation, whatever is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["entry-points"]
    folder = tmp_path / "fx_sparsity_entry-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: fx_sparsity_entry\nVersion: 0\n")
    lines = [f"[{g}]\n" + "\n".join(f"{n} = {t}" for n, t in e.items()) for g, e in groups.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    code = (
        "import torch; model = torch.nn.Linear(4, 4).eval()\n"
        "with torch.no_grad(): print(torch.compile(model, backend='fx_sparsity')(torch.ones(1, 4)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**dict(__import__("os").environ), "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert "tensor" in result.stdout, result.stderr
    (found,) = importlib.metadata.Distribution.at(folder).entry_points
    assert found.load() is backend
