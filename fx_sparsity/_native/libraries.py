"""The libraries there are, one a folder of `csrc`."""

import os
from pathlib import Path

from fx_sparsity._native.library import Library, Schemas

_CSRC = Path(__file__).with_name("csrc")


def _levels() -> list[str]:
    """Weaker instruction sets are compiled in where one of them may be asked for; see `cpu.h`."""
    return ["-DFX_EVERY_LEVEL"] if "FX_SPARSITY_CPU" in os.environ else []


_KERNELS = (
    "ops",
    "block",
    "int4",
    "int4_nm",
    "int4_bitmask",
    "int4_block",
    "bitmask",
    "embedding",
    "expanded",
    "activations",
    "pack",
)
"""Those that take longest to compile first, so that no processor is left with one of them."""

MASKS = Library("masks", [_CSRC / "masks" / "ops.cpp"])
PRUNING = Library("pruning", [_CSRC / "pruning" / "ops.cpp"])
KERNELS = Library(
    "kernels",
    [_CSRC / "kernels" / f"{name}.cpp" for name in _KERNELS],
    _levels,
    ["-DFX_EVERY_LEVEL"],
)
STORAGE = Library("storage", [_CSRC / "storage" / "ops.cpp"])
SCHEMAS = Schemas("schemas", [_CSRC / "schemas" / "ops.cpp"])
LIBRARIES = (MASKS, PRUNING, KERNELS, STORAGE)
"""Those that this process loads."""
BUILT_AHEAD = (*LIBRARIES, SCHEMAS)
"""Those that are compiled ahead."""
