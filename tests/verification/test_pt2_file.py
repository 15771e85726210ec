"""What is deployed: files of `torch.export.save` and AOTInductor are read, and not run."""

import pickle
import re
import subprocess
import sys
import zipfile

import pytest
import torch
import torchao.quantization as tqo
from torch import nn

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
    operator, _, overload = name.partition(".")
    packet = getattr(torch.ops.fx_sparsity, operator)
    print(getattr(packet, overload or "default")._schema)
"""
OPERATORS = (
    *("bitmask_linear", "nm_linear", "block_linear"),
    *("bitmask_linear.int4", "nm_linear.int4", "block_linear.int4", "dense_linear.int4"),
    *("row_pruned_embedding", "row_pruned_embedding_bag"),
)


def schema(name):
    """Of one of `OPERATORS`."""
    operator, _, overload = name.partition(".")
    return str(getattr(getattr(torch.ops.fx_sparsity, operator), overload or "default")._schema)


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
    assert schemas == [schema(name) for name in OPERATORS]


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
    dynamic = ({0: torch.export.Dim("n")},)
    program = torch.export.export(model, (torch.randn(2, 8),), dynamic_shapes=dynamic)
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
    "an operator of nobody": (
        replacing("model.json", b"torch.ops.aten.sigmoid.", b"torch.ops.strange.sigmoid."),
        "it calls torch.ops.strange.sigmoid.default, which this process lacks: import what defines",
    ),
    "another torch": (
        lambda name, content: (
            re.sub(b'"(major|torch_version)": [^,}]*', rb'"\1": "1.0"', content)
            if name == "models/model.json"
            else content
        ),
        r"saved by torch 1.0, and torch \S+ cannot read it: verify it there, or export",
    ),
    "no model": (
        lambda name, content: None if name == "models/model.json" else content,
        "no package of torch.export.save or AOTInductor",
    ),
    "no weight": (
        lambda name, content: None if name == "data/weights/weight_1" else content,
        "cannot be read: ",
    ),
    "a weight that is not listed": (
        replacing("model_weights_config.json", b'"head.bias"', b'"head.other"'),
        "cannot be read: Parameter head.bias is not in the state dict",
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


def test_what_is_no_archive(tmp_path):
    (tmp_path / "model.pt2").write_text("no such thing")
    with pytest.raises(Pt2Error, match=r"model.pt2: damaged: File is not a zip file$"):
        fxs.verify(tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("name", "message"),
    [("version", "do not lie in one folder"), ("model/Byteorder", "two files of one name")],
)
def test_what_torch_could_read_otherwise(exported, tmp_path, name, message):
    path = changed(exported[0], tmp_path / "hostile.pt2", lambda _, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"8.20")
    with pytest.raises(Pt2Error, match=message):
        fxs.verify(path, exported[1])


@pytest.mark.parametrize("case", COMPILED)
def test_a_hostile_package_is_one_line(lowered, tmp_path, case):
    change, message = COMPILED[case]
    path = changed(lowered[0], tmp_path / "hostile.pt2", change)
    with pytest.raises(Pt2Error, match=rf"^{re.escape(str(path))}: .*{message}[^\n]*$"):
        fxs.verify(path, lowered[1])


QUANTIZED = {
    "pt2e static": ("pt2e", default_quantizer(dynamic=False)),
    "pt2e dynamic": ("pt2e", default_quantizer()),
    "torchao int8 dynamic": ("torchao", tqo.Int8DynamicActivationInt8WeightConfig()),
    "torchao int8": ("torchao", tqo.Int8WeightOnlyConfig()),
    "torchao int4": ("torchao", tqo.IntxWeightOnlyConfig(torch.int4, tqo.PerGroup(16))),
    "torchao float8": ("torchao", tqo.Float8WeightOnlyConfig()),
    "eager": ("eager", None),
}
NO_KERNEL = {"torchao int4", "torchao float8"}
NO_EXPORT = {"eager"}
"""But for what is lowered."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("policy", [None, "always"])
@pytest.mark.parametrize("order", ["sparsify_first", "quantize_first"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_quantized_is_deployed(name, order, policy, tmp_path):
    torch.manual_seed(0)
    backend, config = QUANTIZED[name]
    x = torch.randn(4, 64)
    model, proof = fxs.sparsify_and_quantize(
        nn.Sequential(nn.Linear(64, 144), nn.ReLU(), nn.Linear(144, 32)).eval(),
        fxs.WeightNormSparsifier(),
        (x,),
        order=order,
        backend=backend,
        mapping="2:4",
        config=config,
    )
    expected = model(x).detach()
    if policy is not None:
        model, report = fxs.lower(model, (x,), policy)
        assert bool(report.dense) == (name in NO_KERNEL)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), expected, rtol=1e-4, atol=1e-4)
        if name in NO_EXPORT and policy is None:
            with pytest.raises(AttributeError, match="LinearPackedParamsBase"):
                torch.export.export(model, (x,))
            return
        program = torch.export.export(model, (x,))
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    given = torch._inductor.aoti_load_package(path)(x)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    before, after = (fxs.verify(m, proof.record).raise_if_lost() for m in (model, path))
    assert [(r.fqn, r.zeros) for r in after] == [(r.fqn, r.zeros) for r in before]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        {"aot_inductor.force_mmap_weights": True},
        {"aot_inductor.package_constants_on_disk_format": "binary_blob"},
        {
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        },
    ],
)
def test_wherever_the_constants_are_packaged(options, tmp_path):
    model, proof = quantized()
    path = packaged(model, tmp_path / "model.pt2", **options)
    fxs.verify(path, proof.record).raise_if_lost()


@pytest.mark.exhaustive
def test_constants_that_inductor_changes_are_not_said_to_be_well(tmp_path):
    model, proof = quantized()
    frozen = fxs.verify(packaged(model, tmp_path / "frozen.pt2", freezing=True), proof.record)
    faults = {fault for row in frozen for fault in row.faults}
    assert any("its name is lost: package without freezing" in fault for fault in faults)
    apart = {"aot_inductor.package_constants_in_so": False}
    with pytest.raises(Pt2Error, match="bytes of its constants: verify what they are loaded from"):
        fxs.verify(packaged(model, tmp_path / "apart.pt2", **apart), proof.record)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kept", [False, True])
def test_small_constants_are_written_into_the_code(kept, tmp_path):
    model, sparsifier = nn.Sequential(nn.Linear(64, 48)), fxs.WeightNormSparsifier()
    x = torch.randn(2, 64)
    fxs.prepare(model, sparsifier, (x,), "unstructured 50%")
    sparsifier.step()
    model, record = fxs.squash(model, sparsifier)
    model, _ = fxs.lower(model, (x,), {"0": "bitmask"})
    options = {"always_keep_tensor_constants": True} if kept else {}
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (x,)),
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs=options,
        )
    (row,) = fxs.verify(path, record)
    assert [fault.partition(":")[0] for fault in row.faults] == (
        [] if kept else ["its offsets cannot be read"]
    )
