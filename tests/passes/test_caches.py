"""What torch caches never gives a model other masks: they are inputs of compiled code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import fresh_cache

import fx_sparsity as fxs
from fx_sparsity import passes
from tests.passes.cached_model import WAYS, make, run

ROOT = Path(__file__).parents[2]
X = torch.randn(5, 64)


def process(way, seed, folder, freezing="plain", artifacts=""):
    """What the caches were asked in a process of its own, which compared with eager."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.passes.cached_model", way, str(seed), freezing, artifacts],
        cwd=ROOT,
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder),
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("freezing", ["plain", "freezing"])
@pytest.mark.parametrize("way", WAYS)
def test_another_process_has_its_own_masks(way, freezing, tmp_path):
    first, second = (process(way, seed, tmp_path, freezing) for seed in (0, 1))
    if freezing == "plain" or "fxgraph_cache_bypass" not in first:  # as for weights of oneDNN
        assert first["fxgraph_cache_miss"]
        assert second["fxgraph_cache_hit"]  # otherwise this would prove nothing


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", WAYS)
def test_artifacts_that_were_saved_have_no_masks(way, tmp_path):
    artifacts = str(tmp_path / "artifacts")
    process(way, 0, tmp_path / "one", artifacts=artifacts)
    assert process(way, 1, tmp_path / "other", artifacts=artifacts)["fxgraph_cache_hit"]


def test_another_compilation_has_its_own_masks(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)
    with fresh_cache(), torch.no_grad():
        for seed, asked in ((0, "fxgraph_cache_miss"), (1, "fxgraph_cache_hit")):
            torch._dynamo.reset()
            assert run("inductor_pass", seed)[asked]


def masking(model=None):
    return passes.InductorPrepare(model or make(0), fxs.WeightNormSparsifier(), "2:4")


@pytest.mark.parametrize(
    "place", ["joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass"]
)
def test_it_goes_into_one_place_of_inductor(place):
    torch._dynamo.reset()
    with pytest.raises(Exception, match="it goes into pre_grad_custom_pass of torch.compile"):
        torch.compile(make(0), options={place: masking()})(X)


def test_the_model_is_that_which_is_compiled():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="0.weight: no weight of this graph is one of the Seq"):
        torch.compile(make(0), options=masking(make(0)).options)(X)
