import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments, **env):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [(["--pattern", "2:4"], 1), pytest.param([], 3, marks=pytest.mark.exhaustive)],
)
def test_the_real_encoder_keeps_every_zero(arguments, patterns):
    result = run("sparsify_minilm.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "model.pooler.dense.weight" in result.stdout
    assert "every masked value is zero" in result.stdout
    # 2 backends x 39 weights x patterns x 2 orders, and each flow as a whole.
    assert result.stdout.count("100.0%") == 2 * (39 + 1) * 2 * patterns
    assert "lost" not in result.stdout


@pytest.mark.exhaustive
def test_the_encoder_that_is_pruned_with_data_stays_close(tmp_path):
    page = tmp_path / "report.html"
    result = run("prune_minilm.py", "--steps", "2", "--report", str(page))
    assert result.returncode == 0, result.stderr
    assert "36 of 36 ok" in page.read_text()
    assert "every masked value is zero" in result.stdout
    rows = [line.split("│")[1:3] for line in result.stdout.splitlines() if line.count("│") == 6]
    cosines = {name.strip(): float(cosine) for name, cosine in rows}
    assert cosines["unstructured 50% by magnitude"] < 0.9
    assert cosines["the same on sparse kernels"] > 0.94


@pytest.mark.exhaustive
def test_the_encoder_is_distilled():
    result = run("distil_minilm.py", "--steps", "4")
    assert result.returncode == 0, result.stderr
    assert "36 of 40 weights on sparse kernels" in result.stdout
    assert "every masked value is zero" in result.stdout


@pytest.mark.parametrize(
    "script",
    ["transform_script.py", "compile_pipeline.py", "fast_sparse_inference.py", "deploy.py"],
)
def test_the_other_examples_run(script):
    result = run(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_checkpoint_shrinks_from_the_command_line():
    folder = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", str(EXAMPLES / "shrink_checkpoint.sh")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "FX_SPARSITY": f"{sys.executable} -m fx_sparsity.cli",
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(EXAMPLES.parent),
        },
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "38 patterns stated, 0 faults" in result.stdout
    assert "zeros in the first query: 50.0%" in result.stdout
    assert "the compressed file gives the same embeddings" in result.stdout
