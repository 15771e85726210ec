"""One level over many tensors, in one process and split over several."""

import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fx_sparsity.masks import Rank, ScoreError, global_masks
from tests.masks.reference import norm_of

RANKS = [Rank.VALUE, Rank.MAGNITUDE]


def reference(tensors, level, rank):
    scores = np.concatenate([norm_of(t, rank).reshape(-1) for t in tensors])
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[np.argsort(scores, kind="stable")[: round(level * len(scores))]] = False
    parts = keep.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def tensors_of(kind):
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(s, generator=generator) for s in [(50, 40), (0,), (7,), (4, 3, 5), (90_000,)]]
    if kind == "ties":
        x = [(4 * t).round() / 4 for t in x]
    elif kind == "mixed":
        dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.float32, torch.float16]
        x = [t.to(dtype) for t, dtype in zip(x, dtypes, strict=True)]
    elif kind == "double":
        x = [t.double() + 1e-12 * i for i, t in enumerate(x[:-1])]
    elif kind == "special":
        pool = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-45, 2.0])
        x = [pool[torch.randint(7, t.shape, generator=generator)] for t in x]
    return [*x, x[0].t()]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", ["normal", "ties", "mixed", "double", "special"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_one_process(kind, rank, level):
    tensors = tensors_of(kind)
    masks = global_masks(tensors, level, rank)
    for mask, expected in zip(masks, reference(tensors, level, rank), strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.usefixtures("path")
def test_nan_and_nothing():
    with pytest.raises(ScoreError, match="NaN"):
        global_masks([torch.ones(3), torch.tensor([float("nan")])], 0.5)
    assert global_masks([], 0.5) == []
    assert global_masks([torch.empty(0)], 0.5)[0].shape == (0,)


def _part(process, port, kernels, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FX_SPARSITY_KERNELS", kernels)
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=process, world_size=2)
        results = []
        for kind in ("normal", "ties", "double"):
            tensors = tensors_of(kind)
            mine = tensors[:2] if process == 0 else tensors[2:]
            for rank in RANKS:
                results.append(global_masks(mine, 0.5, rank, dist.group.WORLD))
        bad = torch.tensor([float("nan") if process == 1 else 1.0])
        with pytest.raises(ScoreError, match="NaN"):
            global_masks([bad], 0.5, group=dist.group.WORLD)
        torch.save(results, f"{folder}/{process}")
        dist.destroy_process_group()


@pytest.mark.parametrize("kernels", ["0", "1"])
def test_two_processes_give_the_masks_of_one(kernels, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_part, (port, kernels, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / str(process)) for process in range(2))
    cases = [(kind, rank) for kind in ("normal", "ties", "double") for rank in RANKS]
    for (kind, rank), ours, theirs in zip(cases, first, second, strict=True):
        expected = global_masks(tensors_of(kind), 0.5, rank)
        for mask, whole in zip([*ours, *theirs], expected, strict=True):
            assert torch.equal(mask, whole)
