"""Kernels compiled with the address sanitizer, for `test_linear.py` to run in a process of its own."""

import os
import random

import pytest
import torch

from fx_sparsity._native import KERNELS, compiler
from fx_sparsity.kernels import (
    PACKINGS,
    PackingError,
    RowPrunedEmbedding,
    RowPrunedEmbeddingBag,
    SparseLinear,
)
from fx_sparsity.kernels.embedding_ops import MODES
from fx_sparsity.kernels.packings import INT4
from tests.kernels.levels import LEVELS
from tests.kernels.test_embedding import STORED, table
from tests.kernels.test_int4 import made
from tests.kernels.test_linear import layer, sparse

SHAPES = [(1, 1), (16, 16), (17, 5), (40, 67), (33, 1030)]
ROWS = 40
COLUMNS = (1, 15, 16, 17, 64, 65, 150, 1030)


def run(module, tokens):
    dtype = torch.float32 if module.scale is not None else module.weight_dtype
    module(torch.randn(tokens, module.in_features).to(dtype))


def layers():
    for packing in PACKINGS:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            for quantizer in ["none", "token_affine", "tensor_affine"][
                : 3 if dtype == torch.int8 else 1
            ]:
                for shape in SHAPES:
                    for density in (0.0, 0.5, 1.0):
                        if not PACKINGS[packing].refusal(sparse(shape, density, dtype)):
                            yield layer(packing, shape, density, dtype, quantize_input=quantizer)


def four_bits():
    for packing in sorted(INT4):
        for quantizer in ("none", "token_affine"):
            for affine in (False, True):
                for shape in ((37, 2, 32), (20, 1, 61), (70, 3, 8), (16, 1, 1030), (1, 1, 1)):
                    weight, scale, zero_point = made(packing, *shape, affine)
                    if INT4[packing].refusal(weight, zero_point) is None:
                        yield SparseLinear.from_dense(
                            weight,
                            packing=packing,
                            scale=scale,
                            zero_point=zero_point,
                            quantize_input=quantizer,
                        )


def corrupt(module, source):
    """Flip bits of one part; whether the check lets that through."""
    parts = {name: part.clone() for name, part in module.parts().items()}
    filled = sorted(name for name, part in parts.items() if part.numel())
    raw = parts[source.choice(filled)].view(-1).view(torch.uint8)
    for _ in range(source.randint(1, 4)):
        raw[source.randrange(len(raw))] ^= source.randint(1, 255)
    try:
        shape = torch.Size((module.out_features, module.in_features))
        PACKINGS[module.packing].check(parts, shape, module.weight_dtype)
    except PackingError:
        return False
    for name, part in parts.items():
        setattr(module, name, part)
    return True


def linears(source):
    """Layers that ran, and corrupt ones that were refused."""
    ran = refused = 0
    for module in (*layers(), *four_bits()):
        for tokens in (1, 3, 7, 16, 29):
            run(module, tokens)
            ran += 1
        if corrupt(module, source):
            run(module, 2)
        else:
            refused += 1
    return ran, refused


def tables():
    for dtype, bits in STORED:
        for columns in COLUMNS:
            for density in (0.0, 0.5, 1.0):
                weight = table(ROWS, columns, density, dtype)
                yield RowPrunedEmbedding.from_dense(weight, bits=bits)
                for mode in MODES:
                    yield RowPrunedEmbeddingBag.from_dense(
                        weight, bits=bits, mode=mode, padding_idx=3
                    )


def lookups(module):
    """Calls of a table, of each width of indices."""
    bag = isinstance(module, RowPrunedEmbeddingBag)
    for dtype in (torch.int32, torch.int64):
        for shape in [(0, 3), (3, 0), (7, 5), (2, 1100)]:
            indices = torch.randint(0, ROWS, shape, dtype=dtype)
            weighted = bag and module.mode == "sum"
            yield (indices, None, torch.ones(shape)) if weighted else (indices,)
        if bag:
            bounds = torch.tensor([0, 0, 5, *[9] * 1100, 1200], dtype=dtype)
            yield torch.randint(0, ROWS, (1300,), dtype=dtype), bounds


def embeddings(source):
    """Lookups that ran, and indices and offsets that were refused."""
    ran = refused = 0
    for module in tables():
        kept = module.remap
        anything = torch.randint(-(2**31), 2**31 - 1, kept.shape, dtype=torch.int32)
        for remap in (kept, anything, kept + source.choice([-(2**30), -1, 1, len(module.rows)])):
            module.remap = remap  # what no check let through
            for arguments in lookups(module):
                module(*arguments)
                ran += 1
        module.remap = kept
        for outside in (-1, ROWS, 2**31 - 1, -(2**31), 2**40):
            indices = torch.randint(0, ROWS, (300, 20))
            indices[source.randrange(300), source.randrange(20)] = outside
            with pytest.raises(IndexError):
                module(indices)
            refused += 1
        if isinstance(module, RowPrunedEmbeddingBag):
            for offsets in ([0, 7], [1, 2], [0, 4, 2], [0, -3], [-(2**62), 2**62]):
                with pytest.raises(ValueError, match="expected offsets"):
                    module(kept[:6].clamp(0, 0), torch.tensor(offsets))
                refused += 1
    return ran, refused


def main():
    os.environ["FX_SPARSITY_CPU"] = ""  # so that every level is compiled
    usual = compiler.flags
    compiler.flags = lambda *given: [*usual(*given), "-fsanitize=address", "-O1"]
    assert KERNELS.ready(), KERNELS.state()
    source = random.Random(0)
    found = []
    with torch.inference_mode():
        for level in LEVELS:
            os.environ["FX_SPARSITY_CPU"] = level
            found += [linears(source), embeddings(source)]
    assert all(ran and refused for ran, refused in found)
    ran, refused = map(sum, zip(*found, strict=True))
    print(f"clean: {ran} runs, {refused} corrupt weights and lookups refused")


if __name__ == "__main__":
    main()
