import copy
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.kernels import SparseLinear
from fx_sparsity.lowering import compile_backend as compiling
from fx_sparsity.lowering import timing
from fx_sparsity.lowering.compile_backend import backend
from fx_sparsity.masks.engine import compute_mask

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


def test_names_of_submodules_come_from_the_model(masks):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model(breaks=True)

        def forward(self, x):
            return self.inner(x)

    model = Outer().eval()
    mapping = {"module_name": {"inner.middle": "unstructured 50%"}}
    reports = []
    options = {"mapping": mapping, "policy": "always", "report": reports.append, "model": model}
    torch.compile(model, backend=backend, options=options)(X)
    assert {name for r in reports for name in r.lowered} == {"inner.middle.weight"}


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
