"""A program that uses a library, for tests to run in a process and environment of its own.

It may be told of a folder that a wheel has put compiled libraries into.
"""

import sys
from pathlib import Path

import torch

import fx_sparsity._native.library
from fx_sparsity._native import Library

library = Library("tiny", [Path(__file__).parent / "tiny.cpp"])

if __name__ == "__main__":
    for compiled in sys.argv[1:]:
        fx_sparsity._native.library.COMPILED = Path(compiled)
    x = torch.ones(2)
    ready = library.ready()
    print(torch.ops.fx_sparsity_tiny.count(x) if ready else 40 + x.numel())
    print(library.state()[1])
