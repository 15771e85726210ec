"""What is deployed: files of `torch.export.save` and AOTInductor are read, and not run."""

import pickle
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from torch._export.serde import schema

import fx_sparsity as fxs
from fx_sparsity.kernels import libraries
from fx_sparsity.quantization.pt2e import default_quantizer
from fx_sparsity.verification import Pt2Error, SparsityLostError

INPUTS = (torch.arange(28).remainder(11).view(4, 7),)


class Tagger(nn.Module):
    """Codes, two packed layers, and a table that loses rows."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.hidden = nn.Linear(32, 144)
        self.gate = nn.Linear(144, 144, bias=False)
        self.head = nn.Linear(144, 24)

    def forward(self, tokens):
        hidden = self.hidden(self.words(tokens)).relu()
        return self.head(hidden * self.gate(hidden).sigmoid())


def sparse():
    torch.manual_seed(0)
    model, sparsifier = Tagger().eval(), fxs.WeightNormSparsifier()
    mapping = {
        "global": "unstructured 50%",
        "module_name": {"hidden": "2:4", "words": "rows 50%"},
    }
    fxs.prepare(model, sparsifier, INPUTS, fxs.SparsityMapping.from_dict(mapping))
    sparsifier.step()
    return fxs.squash(model, sparsifier)


def quantized():
    torch.manual_seed(0)
    return fxs.sparsify_and_quantize(
        Tagger().eval(),
        fxs.WeightNormSparsifier(),
        INPUTS,
        order="sparsify_first",
        backend="pt2e",
        mapping="unstructured 50%",
        config=default_quantizer(dynamic=False),
    )


@torch.no_grad()
def packaged(model, path, **options):
    program = torch.export.export(model, INPUTS)
    return torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=options
    )


def changed(path, target, change):
    """A copy of a package; `change` gets the name and content of each file, and returns another."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copied:
        for entry in source.infolist():
            content = change(entry.filename.partition("/")[2], source.read(entry))
            if content is not None:
                copied.writestr(entry.filename, content)
    return target


def replacing(ending, *exchange):
    """For `changed`: bytes in one file."""
    return lambda name, content: content.replace(*exchange) if name.endswith(ending) else content


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """A package, the record, and what the model gives."""
    model, record = sparse()
    policy = {"words": "rows", "hidden": "nm", "gate": "bitmask"}
    model, _ = fxs.lower(model, INPUTS, policy)
    path = packaged(model, tmp_path_factory.mktemp("packaged") / "lowered.pt2")
    return path, record, model(*INPUTS).detach()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, proof = quantized()
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    torch.export.save(torch.export.export(model, INPUTS), path)
    return path, proof.record


def test_a_package_of_a_lowered_model_is_read_as_what_it_holds(lowered):
    path, record, _ = lowered
    proof = fxs.verify(path, record).raise_if_lost()
    assert {row.fqn: row.scheme for row in proof} == {
        "words.weight": "packed without zero rows",
        "hidden.weight": "packed as nm",
        "gate.weight": "packed as bitmask",
        "head.weight": "float",
    }
    assert {row.fqn: row.zeros for row in proof} == {
        fqn: int((~mask.keep).count_nonzero()) for fqn, mask in record.items()
    }


def test_a_zero_that_is_lost_in_the_library_is_seen(lowered, tmp_path):
    path, record, _ = lowered
    model, _ = sparse()
    values = model.head.weight.detach().numpy().tobytes()
    end = values.index(bytes(4)) // 4 * 4 + 4
    wrong = values[: end - 2] + b"\x80\x3f" + values[end:]
    lost = changed(path, tmp_path / "lost.pt2", replacing(".so", values, wrong))
    (row,) = [row for row in fxs.verify(lost, record) if row.faults]
    assert (row.fqn, row.faults[0]) == ("head.weight", f"1 of {row.wanted} zeros lost")


RUN = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fx_sparsity":
            raise ImportError(name)


sys.meta_path.insert(0, Absent())
import torch

package, pair, *libraries = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(package)
except RuntimeError as error:
    print(error)
for library in libraries:
    torch.ops.load_library(library)
inputs, expected = torch.load(pair)
torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*inputs), expected)
assert "fx_sparsity" not in sys.modules
for name in OPERATORS:
    print(getattr(torch.ops.fx_sparsity, name).default._schema)
"""
OPERATORS = (
    *("bitmask_linear", "nm_linear", "block_linear"),
    *("row_pruned_embedding", "row_pruned_embedding_bag"),
)


def test_a_package_runs_in_a_process_without_this_code(lowered, tmp_path):
    path, _, expected = lowered
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*INPUTS), expected)
    torch.save((INPUTS, expected), tmp_path / "pair.pt")
    script = f"OPERATORS = {OPERATORS}\n{RUN}"
    command = [sys.executable, "-c", script, path, tmp_path / "pair.pt", *libraries()]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    missing, *schemas = run.stdout.splitlines()
    # As the documentation quotes it.
    assert re.fullmatch(r"Could not find schema for fx_sparsity::\w+\.", missing)
    # What the library defines is what Python does.
    assert schemas == [str(getattr(torch.ops.fx_sparsity, n).default._schema) for n in OPERATORS]


def test_an_exported_program_is_verified_by_its_path(exported):
    path, record = exported
    rows = fxs.verify(path, record).raise_if_lost().rows
    assert [row.dtype for row in rows] == ["uint8", "int8", "int8", "int8"]


def test_the_record_of_another_model(lowered):
    _, record = fxs.squash(*_other())
    with pytest.raises(SparsityLostError, match=r"^none of the 1 weights of the record, such as "):
        fxs.verify(lowered[0], record).raise_if_lost()


def _other():
    model, sparsifier = nn.Sequential(nn.Linear(8, 8)), fxs.WeightNormSparsifier()
    model = fxs.prepare(model, sparsifier, (torch.randn(1, 8),), "2:4")
    sparsifier.step()
    return model, sparsifier


def test_masks_that_are_live_at_export(tmp_path):
    model, sparsifier = _other()
    program = torch.export.export(model, (torch.randn(1, 8),))
    torch.export.save(program, tmp_path / "live.pt2")
    _, record = fxs.squash(model, sparsifier)
    for subject in (program, tmp_path / "live.pt2"):
        (row,) = fxs.verify(subject, record)
        assert row.faults == ("its mask is still live: squash before you export",)
    with pytest.raises(ValueError, match=r"^0.weight still masked: squash before lowering"):
        fxs.lower(program)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


BOMB = pickle.dumps(Bomb())
SAVED = {
    "a pickled weight": (
        replacing("model_weights_config.json", b'"use_pickle": false', b'"use_pickle": true'),
        "is pickled, and could run anything",
    ),
    "example inputs": (
        lambda name, content: BOMB if name == "data/sample_inputs/model.pt" else content,
        "its example inputs could run anything",
    ),
    "an expression": (
        replacing(
            "model.json",
            b'"sizes": [{"as_int": 4}',
            b'"sizes": [{"as_expr": {"expr_str": "exit()"}}',
        ),
        r"'exit\(\)' is no expression of sizes",
    ),
    "another torch": (
        replacing("model.json", b'"major": %d' % schema.SCHEMA_VERSION[0], b'"major": 1'),
        r"saved by torch \S+, which torch \S+ cannot read: verify it there, or export",
    ),
    "no model": (
        lambda name, content: None if name == "models/model.json" else content,
        "no package of torch.export.save or AOTInductor",
    ),
    "no weight": (
        lambda name, content: None if name == "data/weights/weight_1" else content,
        "cannot be read: ",
    ),
    "half a program": (
        lambda name, content: content[:-100] if name == "models/model.json" else content,
        "cannot be read: ",
    ),
}
COMPILED = {
    "no source": (
        lambda name, content: None if name.endswith(".wrapper.cpp") else content,
        "its C.. source, which tells the constants, is not in the package",
    ),
    "no library": (
        lambda name, content: None if name.endswith(".so") else content,
        "it holds no compiled library",
    ),
    "a library that is none": (
        lambda name, content: b"MZ" + content if name.endswith(".so") else content,
        "no ELF file of 64 bits",
    ),
    "half a library": (
        lambda name, content: content[:1000] if name.endswith(".so") else content,
        "its library is damaged",
    ),
    "stripped": (
        replacing(".so", b"_binary_constants_bin_start", b"_binary_constants_bin_other"),
        "symbols that tell where its library keeps constants were stripped",
    ),
    "larger than it is": (
        replacing(".wrapper.cpp", b"shape = {24, 144}", b"shape = {24, 944}"),
        "does not fit into what the package holds of it",
    ),
    "more than there is": (
        replacing(".wrapper.cpp", b"data_size = 576;", b"data_size = 57600000;"),
        r"it holds \d+ of \d+ bytes of its constants: verify what they are loaded from",
    ),
    "no number": (
        replacing(".wrapper.cpp", b"data_size = 576;", b"data_size = many;"),
        "cannot be read: invalid literal",
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_hostile_program_is_one_line(exported, tmp_path, case):
    change, message = SAVED[case]
    path = changed(exported[0], tmp_path / "hostile.pt2", change)
    with pytest.raises(Pt2Error, match=rf"^{re.escape(str(path))}: .*{message}[^\n]*$"):
        fxs.verify(path, exported[1])


@pytest.mark.parametrize("case", COMPILED)
def test_a_hostile_package_is_one_line(lowered, tmp_path, case):
    change, message = COMPILED[case]
    path = changed(lowered[0], tmp_path / "hostile.pt2", change)
    with pytest.raises(Pt2Error, match=rf"^{re.escape(str(path))}: .*{message}[^\n]*$"):
        fxs.verify(path, lowered[1])
