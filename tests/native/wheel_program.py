"""A program that uses every library of an installed fx_sparsity; it needs nothing else of the tests.

    python wheel_program.py FOLDER [INSTRUCTIONS]

What it computes goes to FOLDER/results.pt; with the name of an instruction set it takes the processor
for one that has no more. It logs which libraries it loads.
"""

import copy
import logging
import sys
from pathlib import Path

import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity._native import instruction_sets


def masks(model):
    """Three patterns, by norms of the weights."""
    mapping = fxs.SparsityMapping()
    for name, pattern in {"0": "unstructured 70%", "2": "2:4", "4": "block:4x8 50%"}.items():
        mapping.set_module_name(name, pattern)
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (torch.randn(4, 64),), mapping)
    sparsifier.step()
    found = {name: sparsifier.get_mask(name).clone() for name in sparsifier.names}
    fxs.squash(model, sparsifier)
    return found


def sweep(model):
    """A calibrated method, column after column."""
    batches = [torch.randn(64, 64) for _ in range(2)]
    sparsifier = fxs.SparseGPTSparsifier()
    mapping = fxs.SparsityMapping().set_global("unstructured 60%")
    fxs.prune(model, sparsifier, batches, mapping, progress=False)
    fxs.squash(model, sparsifier)
    return {f"swept {name}": weight for name, weight in model.state_dict().items()}


def kernels(model):
    x = torch.randn(4, 64)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        lowered, report = fxs.lower(copy.deepcopy(model).to(dtype), (x.to(dtype),), policy="always")
        assert report.lowered, report
        found[f"lowered {dtype}"] = lowered(x.to(dtype))
    return found


def files(model, folder):
    fxs.save(model, folder / "model.safetensors", form="bitmask")
    found = fxs.load(folder / "model.safetensors", check=True)
    return {f"loaded {name}": value for name, value in found.items()}


@torch.no_grad()
def main(folder, instructions=None):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if instructions:
        has = {each.name: each.needs for each in instruction_sets.compiled_for()}[instructions]
        instruction_sets.features = lambda: has
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)]
    model = nn.Sequential(*layers).eval()
    results = masks(copy.deepcopy(model))
    results |= sweep(model)
    results |= kernels(model)
    results |= files(model, Path(folder))
    torch.save(results, Path(folder) / "results.pt")
    print(fxs.__file__)


if __name__ == "__main__":
    main(*sys.argv[1:])
