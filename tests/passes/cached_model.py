"""One process of `test_caches.py`: compiles a model by Inductor in one of the ways, and compares it with eager.

Processes that differ by their seed alone have weights of the same shapes, and other values and masks.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters

import fx_sparsity as fxs
from fx_sparsity import passes

PATTERN = "2:4"  # packed as large whatever the mask, so that graphs of other masks look the same
DENSE = {nn.Module: None}


def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def prepared(model, x):
    sparsifier = fxs.WeightNormSparsifier()
    fxs.prepare(model, sparsifier, (x,), PATTERN)
    sparsifier.step()
    return model, sparsifier


def squashed(model, x):
    return fxs.squash(*prepared(model, x))[0]


def live(model, x, **options):
    return torch.compile(prepared(model, x)[0], options=options)


def baked(model, x, **options):
    return torch.compile(squashed(model, x), options=options)


def lowered(model, x, **options):
    return torch.compile(fxs.lower(squashed(model, x), (x,), "nm")[0], options=options)


def backend(model, x, policy="nm", **options):
    options = {"mapping": PATTERN, "policy": policy, "inductor": options}
    return torch.compile(model, backend="fx_sparsity", options=options)


def backend_dense(model, x, **options):
    return backend(model, x, policy=DENSE, **options)


def inductor_pass(model, x, **options):
    masking = passes.InductorPrepare(model, fxs.WeightNormSparsifier(), PATTERN)
    compiled = torch.compile(model, options={**masking.options, **options})
    compiled(x)
    masking.sparsifier.step()
    return compiled


def own_backend(model, x, **options):
    sparsifier = fxs.WeightNormSparsifier()

    def mine(graph, received):
        fxs.prepare(graph, sparsifier, received, PATTERN, model=model)
        sparsifier.step()
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, received, config_patches=options)

    return torch.compile(model, backend=mine)


WAYS = {
    way.__name__: way
    for way in (live, baked, lowered, backend, backend_dense, inductor_pass, own_backend)
}


def run(way, seed, **options):
    """Compile, compare, and tell what the caches were asked."""
    model, x = make(seed), torch.randn(5, 64, generator=torch.Generator().manual_seed(9))
    expected = squashed(copy.deepcopy(model), x)(x)
    counters.clear()
    result = WAYS[way](model, x, **options)(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    asked = {**counters["inductor"], **counters["aot_autograd"]}
    return {name: n for name, n in asked.items() if "cache" in name}


if __name__ == "__main__":
    way, seed, freezing, artifacts = sys.argv[1:]
    file = Path(artifacts)
    if artifacts and file.exists():
        torch.compiler.load_cache_artifacts(file.read_bytes())
    with torch.no_grad():
        asked = run(way, int(seed), **({"freezing": True} if freezing == "freezing" else {}))
    if artifacts and not file.exists():
        file.write_bytes(torch.compiler.save_cache_artifacts()[0])
    print(json.dumps(asked))
