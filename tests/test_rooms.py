"""The order of the code: what may import what, what is called how, and what is in front."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

import fx_sparsity as fxs

ROOT = Path(fxs.__file__).parent
ROOMS = [
    *(
        "errors",
        "markup",
        "reports",
        "progress",
        "_native",
        "patterns",
        "masks",
        "sparsifier",
        "graph",
    ),
    *("verification", "quantization", "pruning", "training", "kernels", "lowering", "passes"),
    *("storage", "checkpoints"),
    *("reporting", "compat", "cli", "env"),
]
"""Each imports only itself and those before it."""
TOP = {"__init__.py", "env.py"}
"""Files that may import everything."""
FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")
}
PEERS = {"native.py", "plan.py", "report.py"}
"""File names that several rooms have, for the same part of each."""
FRONT = {
    *("find_weights", "prepare", "squash", "unprepare", "prune", "lower", "unlower", "verify"),
    *("save", "load", "load_sparse", "export", "hold"),
    *("sparsify_and_quantize", "post_training_sparse_quantize"),
    *("sparsify_checkpoint", "prune_checkpoint", "sparsify_", "SemiSparseWeightConfig"),
    *("SparsityMapping", "SparsityConfig", "SparsityRecord", "WeightMap", "Mask"),
    *("FxSparsityError", "BaseSparsifier", "BaseDataSparsifier", "WeightNormSparsifier"),
    *("DataNormSparsifier", "MagnitudeSparsifier", "WandaSparsifier", "SparseGPTSparsifier"),
    *("Pipeline", "BaseScheduler", "BaseDataScheduler", "LambdaSL", "CubicSL"),
}


def imported(tree):
    """Names of the modules that a file imports, anywhere in it, and of what it takes from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    return path.split("/")[0].removesuffix(".py")


def fresh(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize("path", sorted(FILES.keys() - TOP))
def test_a_room_imports_only_those_before_it(path):
    before = ROOMS[: ROOMS.index(room_of(path)) + 1]
    ours = [f"{name}." for name in imported(FILES[path]) if f"{name}.".startswith("fx_sparsity.")]
    assert [name for name in ours if name.split(".")[1] not in before] == []


def test_a_file_name_is_given_once():
    rooms = defaultdict(list)
    for path in sorted(FILES):
        rooms[path.rpartition("/")[2]].append(path)
    alike = PEERS | {"__init__.py", "__main__.py"}
    twice = {name: paths for name, paths in rooms.items() if len(paths) > 1 and name not in alike}
    assert twice == {}


def test_dynamo_is_imported_in_one_file():
    dynamo = "torch._dynamo"
    using = {
        path
        for path, tree in FILES.items()
        if any(f"{name}.".startswith(f"{dynamo}.") for name in imported(tree))
    }
    assert using == {"graph/compiled.py"}


def test_the_front_names():
    assert len(fxs.__all__) <= 40
    assert fxs.__all__ == sorted(fxs.__all__)
    assert set(fxs.__all__) == FRONT
    for name in fxs.__all__:
        getattr(fxs, name)


def test_the_version_is_that_of_the_distribution():
    assert fxs.__version__ == version("fx_sparsity")


def test_every_error_is_of_the_package_and_of_a_kind_that_python_has():
    names = [module.name for module in pkgutil.walk_packages([str(ROOT)], "fx_sparsity.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    own = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, BaseException)
        and value.__module__.startswith("fx_sparsity.")
    }
    assert len(own) > 5
    for error in own - {fxs.FxSparsityError}:
        assert issubclass(error, fxs.FxSparsityError), error
        assert issubclass(error, ValueError | RuntimeError), error


def test_importing_takes_no_compiler_along():
    heavy = {
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "torchao",
        "transformers",
        "click",
        "rich",
    }
    before = fresh("import sys, torch; print(*sys.modules)")
    after = fresh("import sys, fx_sparsity; print(*sys.modules)")
    assert heavy & set(after) <= heavy & set(before)
    assert "torch._dynamo" not in after


def test_rooms_are_imported_when_they_are_asked_for():
    late = ("reporting", "passes", "training")
    code = f"import sys, fx_sparsity as fxs; print(*(f'fx_sparsity.{{n}}' in sys.modules for n in {late}))"
    code = f"{code}; print(callable(fxs.reporting.write_html), callable(fxs.passes.Prepare), callable(fxs.training.Sparsify))"
    assert fresh(code) == ["False", "False", "False", "True", "True", "True"]
