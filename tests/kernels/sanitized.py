"""Kernels compiled with the address sanitizer, for `test_linear.py` to run in a process of its own."""

import os
import random

import torch

from fx_sparsity._native import compiler
from fx_sparsity.kernels import PACKINGS, PackingError
from fx_sparsity.kernels.native import LIBRARY
from tests.kernels.test_linear import LEVELS, layer

SHAPES = [(1, 1), (16, 16), (17, 5), (40, 67), (33, 1030)]


def run(module, tokens):
    dtype = torch.float32 if module.scale is not None else module.weight_dtype
    module(torch.randn(tokens, module.in_features).to(dtype))


def layers():
    for packing in PACKINGS:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            for how in ["none", "token_affine", "tensor_affine"][: 3 if dtype == torch.int8 else 1]:
                for shape in SHAPES:
                    for density in (0.0, 0.5, 1.0):
                        yield layer(packing, shape, density, dtype, quantize_input=how)


def corrupt(module, source):
    """Flip bits of one part; whether the check lets that through."""
    parts = {name: part.clone() for name, part in module.parts().items()}
    raw = parts[source.choice(sorted(parts))].view(-1).view(torch.uint8)
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


def main():
    usual = compiler.flags
    compiler.flags = lambda: [*usual(), "-fsanitize=address", "-O1"]
    assert LIBRARY.ready(), LIBRARY.state()
    source = random.Random(0)
    ran = refused = 0
    with torch.inference_mode():
        for level in LEVELS:
            os.environ["FX_SPARSITY_CPU"] = level
            for module in layers():
                for tokens in (1, 3, 7, 16, 29):
                    run(module, tokens)
                    ran += 1
                if corrupt(module, source):
                    run(module, 2)
                else:
                    refused += 1
    assert ran
    assert refused
    print(f"clean: {ran} runs, {refused} corrupt weights refused")


if __name__ == "__main__":
    main()
