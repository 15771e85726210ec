"""The C++ operators of this room, compiled on first use."""

from pathlib import Path

from fx_sparsity._native import Library

_FOLDER = Path(__file__).parent / "cpp"

LIBRARY = Library("kernels", sorted(_FOLDER.glob("*.cpp")))
