"""What runs here, and why: `python -m fx_sparsity.env`, and `--build` to build ahead."""

import argparse
import os
import platform
import sys

import torch

from fx_sparsity._native import BUILT_AHEAD, LIBRARIES, cache, compiler
from fx_sparsity._native.compiler import BuildError


def describe() -> str:
    """Versions, the processor, the compiler, the cache, and the path each room takes."""
    rows = [
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"),
        ("cpu capability", torch.backends.cpu.get_cpu_capability()),
        ("compiler", _compiler()),
        ("cache", " or ".join(map(str, cache.folders()))),
        *((library.name, library.state()[1]) for library in LIBRARIES),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(arguments: list[str] | None = None) -> int:
    """Print the report, or build; the exit status is not zero if a library cannot be built."""
    parser = argparse.ArgumentParser(prog="python -m fx_sparsity.env", description=__doc__)
    parser.add_argument("--build", action="store_true", help="compile all kernels into the cache")
    if not parser.parse_args(arguments).build:
        print(describe())
        return 0
    for library in BUILT_AHEAD:
        try:
            print(f"{library.name}: {library.build()}")
        except BuildError as error:
            print(f"{library.name}: {error}", file=sys.stderr)
            return 1
    return 0


def _compiler() -> str:
    try:
        return " ".join(compiler.find())
    except BuildError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
