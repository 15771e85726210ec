"""`python -m fx_sparsity.env`."""

import pytest

from tests.native.test_library import environment, start


def test_report(tmp_path):
    process = start(environment(tmp_path, FX_SPARSITY_KERNELS="0"), "fx_sparsity.env")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    rows = dict(line.split(None, 1) for line in out.splitlines())
    for name in ("masks", "pruning", "kernels", "storage"):
        assert rows[name] == "plain torch, because FX_SPARSITY_KERNELS=0"
    assert f"{tmp_path}/home/.cache/fx_sparsity or " in rows["cache"]
    assert {"python", "torch", "system", "cpu", "compiler"} <= rows.keys()


def test_build_says_why_it_cannot(tmp_path):
    env = environment(tmp_path, CXX="/no/compiler")
    out, err = (process := start(env, "fx_sparsity.env", "--build")).communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert err == "masks: the C++ compiler in $CXX, '/no/compiler', was not found\n"


@pytest.mark.exhaustive
def test_build_then_run_without_a_compiler(tmp_path):
    """The portable code, too: the compiler is told to leave the vector instructions out."""
    env = environment(tmp_path, CXX="c++ -mno-avx512f")
    process = start(env, "fx_sparsity.env", "--build")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    paths = dict(line.split(": ") for line in out.splitlines())
    for name in ("masks", "pruning", "kernels", "storage"):
        assert paths[name].startswith(f"{tmp_path}/home/.cache/fx_sparsity/{name}-")

    env["CXX"] = "/no/compiler"
    out, _ = start(env, "fx_sparsity.env").communicate(timeout=120)
    assert all(f"C++ kernels from {path}" in out for path in paths.values())
    tests = ["tests/masks/test_exact.py", "tests/masks/test_refusals.py"]
    tests += [f"tests/pruning/methods/test_{room}.py" for room in ("sparsegpt", "refinements")]
    options = ["-q", "-k", "native", "-p", "no:cacheprovider"]
    process = start(env, "pytest", *options, *tests)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
