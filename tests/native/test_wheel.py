"""A wheel with compiled libraries: which of them is taken, and that it needs nothing else."""

import os
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from fx_sparsity._native import BUILT_AHEAD, LIBRARIES, compiler, instruction_sets
from tests.native.program import library
from tests.native.test_library import ROOT, environment, finish, start

SKYLAKE = (
    "fpu sse sse2 pni ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c lahf_lm abm bmi1 "
    "avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl"
)
ICE_LAKE = (
    f"{SKYLAKE} avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq avx512ifma gfni"
)
PROCESSORS = {
    "fpu sse sse2": None,
    "fpu sse sse2 pni ssse3 cx16 sse4_1 sse4_2 popcnt aes lahf_lm": "v2",
    SKYLAKE.partition(" avx512")[0]: "v3",
    SKYLAKE.replace(" fma", ""): "v2",
    SKYLAKE: "v4",
    f"{SKYLAKE} avx512_vnni": "v4-vnni",
    f"{SKYLAKE} avx512_vnni avx512_bf16": "v4-vnni",
    ICE_LAKE: "v4-vbmi2",
    f"{ICE_LAKE} avx512_bf16 amx_tile": "v4-bf16",
}
WORDS = {
    "__SSE3__": "pni",
    "__LZCNT__": "abm",
    "__BMI__": "bmi1",
    "__LAHF_SAHF__": "lahf_lm",
    "__GCC_HAVE_SYNC_COMPARE_AND_SWAP_16": "cx16",
    **{
        f"__AVX512{name}__": f"avx512{name.lower()}"
        for name in ("F", "CD", "BW", "DQ", "VL", "VBMI")
    },
    **{
        f"__AVX512{name}__": f"avx512_{name.lower()}"
        for name in ("VNNI", "VBMI2", "BITALG", "VPOPCNTDQ", "BF16")
    },
}
"""What compilers call otherwise than Linux does; the rest differ in case and underscores."""
NO_INSTRUCTIONS = r"__(FP_FAST_FMA|CRC32|EVEX|SSE_MATH|SSE2_MATH|k8|REG_REDZONE)"


@pytest.fixture
def x86_64(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("x86_64")
@pytest.mark.parametrize(("has", "name"), PROCESSORS.items())
def test_a_processor_gets_the_best_that_it_can_execute(has, name):
    found = instruction_sets.best(frozenset(has.split()))
    assert (found and found.name) == name


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_elsewhere_there_is_one_for_all(monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    found = instruction_sets.best(frozenset())
    assert (found.name, found.flags) == (machine, ())


def macros(flags):
    command = [*compiler.find(), "-dM", "-E", "-x", "c++", *flags, os.devnull]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^#define (__\w+) 1$", lines, re.MULTILINE))


def test_the_compiler_may_use_what_is_asked_of_the_processor_and_nothing_else():
    usual = macros(["-march=x86-64"])
    for instructions in instruction_sets.compiled_for():
        used = {
            WORDS.get(macro, macro.strip("_").lower())
            for macro in macros(instructions.flags) - usual
            if not re.match(NO_INSTRUCTIONS, macro)
        }
        assert used - instructions.needs == set(), instructions.name
        assert instructions.needs - used <= {"xsave", "lahf_lm", "movbe", "avx512cd"}


def test_what_the_wheel_brought_comes_first_and_what_does_not_load_is_passed_over(tmp_path):
    compiled = tmp_path / "compiled"
    compiled.mkdir()
    path = library.build_for_wheel(compiled, instruction_sets.best(instruction_sets.features()))
    env = environment(tmp_path, CXX="/no/compiler")
    program = ("tests.native.program", str(compiled))
    assert finish(start(env, *program)) == (f"C++ kernels from {path}", [])
    assert list((tmp_path / "home").iterdir()) == []

    path.write_text("no library")
    reason, (refused, plain) = finish(start(env, *program))
    assert refused.startswith(f"tiny: not what the wheel brought, because {path}: ")
    assert reason.startswith("plain torch, because the C++ compiler in $CXX")
    assert plain == f"tiny: {reason}"


def build(folder, **variables):
    """The wheel of a copy of the sources, in which nothing was built before."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, files)):
        if not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w"]
    env = {**os.environ, **variables}
    subprocess.run([*command, folder / "dist", folder], env=env, check=True, cwd=folder)
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def compiled_in(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    return [Path(name).name for name in names if "/compiled/" in name and name[-1] != "/"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The one named by FX_SPARSITY_TEST_WHEEL, or one that is built now."""
    if given := os.environ.get("FX_SPARSITY_TEST_WHEEL"):
        return Path(given).resolve()
    return build(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A fresh environment with the wheel in it, and the torch that runs the tests."""
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    inside = str(venv / "bin" / "python")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        inside,
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, wheel], check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([inside, "-c", ask], capture_output=True, text=True, check=True)
    Path(packages.stdout.strip(), "torch.pth").write_text(sysconfig.get_path("purelib"))
    return inside


def run(python, folder, instructions="", **variables):
    """Results of `wheel_program.py`, and what was logged; with no compiler in reach."""
    folder.mkdir()
    env = environment(folder, PATH=str(folder), **variables)
    del env["PYTHONPATH"]
    command = [python, Path(__file__).with_name("wheel_program.py"), folder, instructions]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(Path(python).parents[1]))
    assert [path for path in (folder / "home").rglob("*") if path.suffix != ".json"] == []
    loaded = re.findall(r"^(\w+): C\+\+ kernels from (.*)$", done.stderr, re.MULTILINE)
    assert "compil" not in done.stderr.replace("/compiled/", "")
    return torch.load(folder / "results.pt"), dict(loaded)


def runnable():
    has = instruction_sets.features()
    return [found.name for found in instruction_sets.compiled_for() if found.needs <= has]


@pytest.mark.exhaustive
def test_a_wheel_needs_no_compiler(wheel, python, tmp_path):
    assert re.fullmatch(r"fx_sparsity-.*-py3-none-(?!any)\w+\.whl", wheel.name)
    known = {found.name for found in instruction_sets.compiled_for()}
    assert len(compiled_in(wheel)) == len(known) * len(BUILT_AHEAD)
    expected, loaded = run(python, tmp_path / "plain", FX_SPARSITY_KERNELS="0")
    assert loaded == {}
    for instructions in runnable():
        results, loaded = run(python, tmp_path / instructions, instructions)
        assert loaded.keys() == {each.name for each in LIBRARIES}
        for name, path in loaded.items():
            assert re.fullmatch(f"{name}-{instructions}-[0-9a-f]{{16}}.so", Path(path).name)
            assert Path(path).is_relative_to(Path(python).parents[1])
        torch.testing.assert_close(results, expected)
    results, loaded = run(python, tmp_path / "as it is")
    assert all(f"-{runnable()[0]}-" in path for path in loaded.values())
    torch.testing.assert_close(results, expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("cpu", ["portable", "avx2"])
def test_weaker_instructions_may_be_asked_for(python, tmp_path, cpu):
    expected, _ = run(python, tmp_path / "plain", FX_SPARSITY_KERNELS="0")
    results, loaded = run(python, tmp_path / "asked", FX_SPARSITY_CPU=cpu)
    assert len(loaded) == len(LIBRARIES)
    torch.testing.assert_close(results, expected)


@pytest.mark.exhaustive
def test_a_wheel_of_sources(tmp_path):
    wheel = build(tmp_path, FX_SPARSITY_WHEEL="pure")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert compiled_in(wheel) == []


@pytest.mark.exhaustive
def test_a_wheel_that_cannot_be_compiled_is_an_error(tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path, CXX="/no/compiler")
    said = "".join(capfd.readouterr())
    assert "the C++ compiler in $CXX, '/no/compiler', was not found" in said
    assert "FX_SPARSITY_WHEEL=pure" in said
