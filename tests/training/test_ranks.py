"""Data-parallel ranks, which see different data, move their masks alike."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fx_sparsity.training import RigL, Sparsify
from tests.training.toys import Toy, original


def _train(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, method = Toy().model(), RigL(every=2, fraction=0.5)
    method.prepare(model, [{"tensor_fqn": "0.weight", "sparsity_level": 0.75}])
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.5)
    Sparsify(parallel, method, optimizer)
    data = Toy(seed=rank)
    first = method.keep("0.weight").clone()
    for _ in range(6):
        optimizer.zero_grad()
        data.loss(parallel).backward()
        optimizer.step()
    moved = not torch.equal(first, method.keep("0.weight"))
    torch.save((moved, method.keep("0.weight"), original(model).detach()), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_ranks_with_different_data_move_their_masks_alike(tmp_path):
    mp.spawn(_train, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[0]
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
