"""A `.pt2` file: an exported program, or a package of AOTInductor. Nothing of it is run.

`torch.export.load` trusts a file. What it would run of one, which pickles and expressions of sizes
can make it do, is looked for before it is called.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.export import ExportedProgram

from fx_sparsity.verification.aoti_constants import Package, Pt2Error, read_package

_MODEL = "models/model.json"
_COMPILED = "data/aotinductor/"
_WRONG = (ValueError, TypeError, LookupError, RuntimeError, AttributeError, AssertionError)
"""What torch, and what is done here, raise for files that are not as they should be."""
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_NAMES = (
    *("Symbol", "Integer", "Rational", "Add", "Mul", "Pow", "Max", "Min"),
    *("Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing"),
    *("positive", "nonnegative", "integer", "True", "False"),
)
_SIZES = re.compile(rf"('\w+'|[a-z]\d+\b|({'|'.join(_NAMES)})\b|\d+|[-+*/()<>=!, ])*")
"""Expressions of sizes that torch makes; it hands them to `eval`."""


def is_archive(path: str | Path) -> bool:
    """Whether a file is a zip archive, as a `.pt2` file is, or has that name.

    Raises:
        FileNotFoundError: there is none.
    """
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\3\4" or Path(path).suffix == ".pt2"


def read_pt2(path: str | Path) -> ExportedProgram | Package:
    """What a `.pt2` file holds.

    Raises:
        Pt2Error: it was written by another torch, is damaged, holds several models, or what would
            have to be run to read it; one line says which, and what to do.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = _contents(archive)
        if any(name.startswith(_COMPILED) for name in files):
            return _package(files)
        if _MODEL not in files:
            raise Pt2Error("no package of torch.export.save or AOTInductor")
        program = json.loads(files[_MODEL])
        _refuse_what_runs(files, program)
        _refuse_missing_operators(program)
        return _loaded(path, program)
    except Pt2Error as error:
        raise Pt2Error(f"{path}: {error}") from error
    except (zipfile.BadZipFile, UnpicklingError, UnicodeError, NotImplementedError) as error:
        raise Pt2Error(f"{path}: damaged: {_line(error)}") from error
    except _WRONG as error:
        raise Pt2Error(f"{path}: cannot be read: {_line(error)}") from error


def _contents(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """Path within the package -> content.

    What torch's own reader could take for another file is refused: it takes no notice of case, and
    falls back to an older format, with pickles, where files lie outside of the folder for all.
    """
    names = archive.namelist()
    packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise Pt2Error(f"{packed[0].filename} is compressed, which torch never does")
    if len({name.partition("/")[0] for name in names}) > 1 or not all("/" in n for n in names):
        raise Pt2Error("its files do not lie in one folder: no package of torch")
    if len({name.lower() for name in names}) < len(names):
        raise Pt2Error("it has two files of one name: no package of torch")
    inner = {name.partition("/")[2]: name for name in names}
    if not any(name.startswith(_COMPILED) for name in inner):
        # Of a program, torch reads the tensors itself.
        inner = {name: whole for name, whole in inner.items() if not _TENSOR.fullmatch(name)}
    return {name: archive.read(whole) for name, whole in inner.items()}


def _package(files: dict[str, bytes]) -> Package:
    if any(name.startswith("models/") for name in files):
        raise Pt2Error("holds a program beside a package: save each by itself to verify it")
    models: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        if name.startswith(_COMPILED):
            model, _, file = name.removeprefix(_COMPILED).partition("/")
            models.setdefault(model, {})[file] = content
    if len(models) != 1:
        raise Pt2Error(f"holds the models {', '.join(models)}: package each by itself to verify it")
    weights = {
        name.removeprefix("data/weights/"): content
        for name, content in files.items()
        if name.startswith("data/weights/")
    }
    (model_files,) = models.values()
    return read_package(model_files, weights)


def _loaded(path: str | Path, program: dict[str, Any]) -> ExportedProgram:
    """The program that lies there, which was looked through.

    Raises:
        Pt2Error: torch cannot read it, maybe because another one saved it.
    """
    try:
        return torch.export.load(path)
    except Exception as error:  # those of torch.export are private
        saved_by = program.get("torch_version", "of an unknown version")
        if saved_by == torch.__version__:
            raise Pt2Error(f"cannot be read: {_line(error)}") from error
        raise Pt2Error(
            f"saved by torch {saved_by}, and torch {torch.__version__} cannot read it: verify it "
            f"there, or export the model again ({_line(error)})"
        ) from error


def _refuse_what_runs(files: dict[str, bytes], program: dict[str, Any]) -> None:
    """Raise where `torch.export.load` would run what the file brings."""
    trusted = "if you trust it, verify(torch.export.load(path), record)"
    for name in (
        "data/weights/model_weights_config.json",
        "data/constants/model_constants_config.json",
    ):
        for fqn, payload in json.loads(files.get(name, b'{"config": {}}'))["config"].items():
            if payload["use_pickle"] or not payload["path_name"].startswith(("weight_", "tensor_")):
                raise Pt2Error(f"{fqn} is pickled, and could run anything: {trusted}")
    if old := [
        name for name in files if name in ("data/weights/model.pt", "data/constants/model.pt")
    ]:
        raise Pt2Error(f"{old[0]} is of an older torch, and pickled: {trusted}")
    if inputs := files.get("data/sample_inputs/model.pt"):
        try:
            torch.load(io.BytesIO(inputs), weights_only=True)
        except UnpicklingError as error:
            raise Pt2Error(f"its example inputs could run anything: {trusted}") from error
    for expression in (*_values(program, "expr_str"), *program["range_constraints"]):
        if not _SIZES.fullmatch(expression):
            raise Pt2Error(f"{expression!r} is no expression of sizes, and would be run: {trusted}")


def _values(value: Any, key: str) -> Iterator[str]:
    """Every text that a serialised program has under a key, however deep."""
    if isinstance(value, dict):
        if isinstance(text := value.get(key), str):
            yield text
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)


def _refuse_missing_operators(program: dict[str, Any]) -> None:
    """Raise where the program calls operators that nobody has defined in this process."""
    for target in sorted(set(_values(program, "target"))):
        if not target.startswith("torch.ops."):
            continue
        namespace, name = target.removeprefix("torch.ops.").split(".")[:2]
        if not hasattr(getattr(torch.ops, namespace), name):
            raise Pt2Error(
                f"it calls {target}, which this process lacks: import what defines it, such as "
                "torchao.quantization.pt2e for quantized_decomposed"
            )


def _line(error: Exception) -> str:
    """The first line of what went wrong."""
    return next(iter(str(error).splitlines()), type(error).__name__)
