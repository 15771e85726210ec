"""However building goes, the program works, and one line says which path it takes and why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fx_sparsity._native import cache, compiler
from tests.native.program import library

ROOT = Path(__file__).parents[2]
UNWRITABLE = "/proc/no-home"  # not even for root


def environment(folder, **variables):
    """This process's, with a home and temporary folder of its own; None takes a variable out."""
    for name in ("home", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    found = {**os.environ, "HOME": f"{folder}/home", "TMPDIR": f"{folder}/tmp"}
    found["PYTHONPATH"] = str(ROOT)
    for name in ("XDG_CACHE_HOME", "FX_SPARSITY_CACHE", "FX_SPARSITY_KERNELS", "CXX"):
        found.pop(name, None)
    return {**found, **variables}


def start(env, *command):
    return subprocess.Popen(
        [sys.executable, "-m", *(command or ["tests.native.program"])],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """The program's two lines of output, and what it logged."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    answer, reason = out.splitlines()
    assert answer == "42"
    return reason, err.splitlines()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def counting_compiler(folder):
    """A compiler that leaves a line in `folder`/calls each time it is called."""
    real = compiler.find()[0]
    return script(folder / "compiler", f'echo called >> {folder}/calls\nexec {real} "$@"')


def test_built_once_then_found(tmp_path):
    env = environment(tmp_path, CXX=counting_compiler(tmp_path))
    reason, logged = finish(start(env))
    folder = tmp_path / "home/.cache/fx_sparsity"
    assert reason.startswith(f"C++ kernels from {folder}")
    assert len(logged) == 1
    assert "compiling" in logged[0]
    assert finish(start(env)) == (reason, [])
    # What was built ahead is found where there is no compiler.
    assert finish(start({**env, "CXX": "/no/compiler"})) == (reason, [])
    assert (tmp_path / "calls").read_text() == "called\n"
    assert [path.suffix for path in sorted(folder.iterdir())] == [".lock", ".so"]


def test_processes_that_build_at_once(tmp_path):
    env = environment(tmp_path, CXX=counting_compiler(tmp_path))
    for reason, _ in [finish(process) for process in [start(env) for _ in range(3)]]:
        assert reason.startswith("C++ kernels")
    assert (tmp_path / "calls").read_text() == "called\n"


def test_cannot_lock(tmp_path, monkeypatch):
    """Where files cannot be locked every process builds, and the last one to finish wins."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    target = tmp_path / "tiny.so"
    compiler.compile_library(compiler.find(), library.sources, target, compiler.flags())
    assert target.read_bytes()[:4] == b"\x7fELF"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "variable",
    [
        "HOME",
        *(
            pytest.param(v, marks=pytest.mark.exhaustive)
            for v in ("XDG_CACHE_HOME", "FX_SPARSITY_CACHE")
        ),
    ],
)
def test_nowhere_to_write_but_the_temporary_folder(tmp_path, variable):
    env = environment(tmp_path, **{variable: UNWRITABLE})
    reason, logged = finish(start(env))
    assert reason.startswith(f"C++ kernels from {tmp_path}/tmp/fx_sparsity-")
    assert len(logged) == 1
    assert f"{UNWRITABLE}" in logged[0]
    assert "cannot be written" in logged[0]
    assert finish(start(env)) == (reason, [])


def test_nowhere_to_write(tmp_path):
    env = environment(tmp_path, HOME=UNWRITABLE)
    (tmp_path / "tmp" / f"fx_sparsity-{os.getuid()}").touch()
    reason, logged = finish(start(env))
    assert "cannot be written" in reason
    assert logged == [f"tiny: {reason}"]


@pytest.mark.parametrize("variable", ["TMPDIR", "XDG_CACHE_HOME", "FX_SPARSITY_CACHE"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
def test_a_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch, mode, variable):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv(variable, str(tmp_path / "chosen"))
    folder = cache.folders()[-1 if variable == "TMPDIR" else 0]
    assert not cache.refusal(folder)
    assert cache.usable(folder)
    (folder / "library.so").touch(0o755)
    assert cache.usable(folder / "library.so")
    folder.chmod(mode)
    assert not cache.usable(folder)
    assert cache.refusal(folder) == f"{folder} can be written by other users"
    folder.chmod(0o700)
    (folder / "library.so").chmod(mode)
    assert not cache.usable(folder / "library.so")


@pytest.mark.parametrize(("mode", "good"), [(0o777, False), (0o1777, True), (0o755, True)])
def test_nor_one_whose_parents_others_can_exchange(tmp_path, monkeypatch, mode, good):
    monkeypatch.setenv("FX_SPARSITY_CACHE", str(tmp_path / "shared" / "mine"))
    folder = cache.folders()[0]
    assert not cache.refusal(folder)
    folder.parent.chmod(mode)
    assert cache.usable(folder) == good


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_nor_one_of_another_user(tmp_path, monkeypatch):
    monkeypatch.setenv("FX_SPARSITY_CACHE", str(tmp_path / "theirs"))
    folder = cache.folders()[0]
    assert not cache.refusal(folder)
    os.chown(folder, 12345, 12345)
    assert not cache.usable(folder)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    cache.folders()[-1].symlink_to(tmp_path)
    assert not cache.usable(cache.folders()[-1])


def test_no_compiler(tmp_path):
    reason, logged = finish(start(environment(tmp_path, CXX="/no/compiler")))
    assert reason == (
        "plain torch, because the C++ compiler in $CXX, '/no/compiler', was not found"
    )
    assert logged == [f"tiny: {reason}"]
    reason, logged = finish(start(environment(tmp_path, PATH=str(tmp_path))))
    assert "no C++ compiler was found" in reason
    assert logged == [f"tiny: {reason}"]


def test_failing_compiler(tmp_path):
    text = (
        'while [ "$1" != -o ]; do shift; done\necho half > "$2"\necho "tiny.cpp:1: error: no" >&2'
    )
    text += "\nexit 3"
    failing = script(tmp_path / "failing", text)
    reason, logged = finish(start(environment(tmp_path, CXX=failing)))
    assert reason == (
        f"plain torch, because {failing} failed with exit status 3: tiny.cpp:1: error: no"
    )
    assert logged[1:] == [f"tiny: {reason}"]
    assert list((tmp_path / "home/.cache/fx_sparsity").glob("*.so")) == []


def test_library_that_cannot_be_loaded(tmp_path):
    """Such as one from a compiler that says it succeeded."""
    real = shutil.which("true")
    broken = script(tmp_path / "broken", f'while [ "$1" != -o ]; do shift; done\ncp {real} "$2"')
    reason, logged = finish(start(environment(tmp_path, CXX=broken)))
    assert reason.startswith("plain torch, because")
    assert logged[1:] == [f"tiny: {reason}"]


def test_turned_off(tmp_path):
    reason, logged = finish(start(environment(tmp_path, FX_SPARSITY_KERNELS="0")))
    assert reason == "plain torch, because FX_SPARSITY_KERNELS=0"
    assert logged == []
    assert list((tmp_path / "home").iterdir()) == []


def test_file_name_changes_with_what_the_file_depends_on(tmp_path, monkeypatch):
    for name in ("tiny.cpp", "tiny.h"):
        shutil.copy(library.sources[0].with_name(name), tmp_path)
    moved = type(library)("tiny", [tmp_path / "tiny.cpp"])
    names = [moved._file_name(), moved._file_name()]
    assert names[0] == names.pop()
    with (tmp_path / "tiny.h").open("a") as header:
        header.write("// another\n")
    names.append(moved._file_name())
    with monkeypatch.context() as patch:
        patch.setattr(cache, "instruction_set", lambda: "another processor")
        names.append(moved._file_name())
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "2.99")
        names.append(moved._file_name())
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "flags", lambda: ["-O0"])
        names.append(moved._file_name())
    assert len(set(names)) == 5


def test_instruction_set_tells_processors_apart(monkeypatch):
    seen = []
    for flags in ("sse avx2", "avx2 sse", "sse avx2 avx512f"):
        text = f"processor: 0\nmodel name: any\nflags\t: {flags}\n"
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        seen.append(cache.instruction_set())
    assert seen[0] == seen[1] != seen[2]
