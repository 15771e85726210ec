"""Activations in files: the same results, in memory that does not grow with the data."""

import copy
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fx_sparsity as fxs
from fx_sparsity.graph import InputError
from fx_sparsity.pruning import Reconstruction
from fx_sparsity.pruning.offload import offload_to
from tests.pruning.limited import M_MMAP_THRESHOLD, MIB, PeakOfOwnMemory

WIDTH = 64


class Layer(nn.Module):
    """A residual block that writes in place, and hands on a view."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(self.act(self.up(x)))).view(-1, 32, WIDTH)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(2))).eval()


def data(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(4, 32, WIDTH, generator=generator)


@pytest.mark.parametrize("sequential", [True, "blocks"])
@pytest.mark.parametrize("reconstruction", [None, Reconstruction(steps=3)])
def test_the_same_bit_for_bit(
    tmp_path: Path, sequential: bool, reconstruction: Reconstruction | None
) -> None:
    models = [layers(), layers()]
    for model, folder in zip(models, (None, tmp_path), strict=True):
        fxs.prune(
            model,
            fxs.SparseGPTSparsifier(),
            data(6),
            "2:4",
            sequential=sequential,
            reconstruction=reconstruction,
            offload=folder,
            progress=False,
        )
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not list(tmp_path.iterdir())


def peak(count: int, folder: Path | None, reconstruction: Reconstruction | None) -> int:
    """Bytes of the process's own that pruning takes at the most, without the pages of files."""
    model = layers()
    with PeakOfOwnMemory() as found:
        fxs.prune(
            model,
            fxs.SparseGPTSparsifier(),
            (batch.repeat(64, 1, 1) for batch in data(count)),
            "2:4",
            reconstruction=reconstruction,
            offload=folder,
            progress=False,
        )
    return found.most


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """In a process of its own, whose allocator gives back at once what is freed."""
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for few, many, held in json.loads(result.stdout):
        assert held - few > 10 * 64 * 4 * 32 * WIDTH * 4  # of ten batches more, one activation
        assert many - few < (held - few) / 4


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    keep = offload_to(tmp_path)
    base = torch.arange(4096.0)
    other = torch.arange(1000, dtype=torch.bfloat16).view(10, 100).mT
    tree = {"base": base, "view": base[8:16].view(2, 4), "rest": [other, 3, None, "text"]}
    expected = copy.deepcopy(tree)
    found = keep(tree)
    assert torch.equal(found["base"], expected["base"])
    assert torch.equal(found["rest"][0], expected["rest"][0])
    assert found["rest"][0].stride() == other.stride()
    assert found["rest"][1:] == [3, None, "text"]
    found["base"][8] = -1
    assert found["view"][0, 0] == -1
    assert base[8] == 8
    again = keep(found)
    assert again["base"].data_ptr() == found["base"].data_ptr()


def test_what_cannot_be_offloaded(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="offload: expected a folder, found '.*missing'"):
        fxs.prune(layers(), fxs.WandaSparsifier(), data(2), "2:4", offload=tmp_path / "missing")
    with pytest.raises(InputError, match="expected an iterable of batches"):
        fxs.prune(layers(), fxs.WandaSparsifier(), torch.ones(2), "2:4", offload=tmp_path)


if __name__ == "__main__":
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    scratch = Path(sys.argv[1])
    peak(2, scratch, Reconstruction(steps=1))  # whatever is loaded, built and kept once
    print(
        json.dumps(
            [
                (peak(2, scratch, how), peak(12, scratch, how), peak(12, None, how))
                for how in (None, Reconstruction(steps=1))
            ]
        )
    )
