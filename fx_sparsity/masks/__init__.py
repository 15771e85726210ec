"""The mask engine: scores, a tiling and a level in; a mask out. Knows tensors, not models."""

from fx_sparsity.masks.engine import ScoreError, compute_mask
from fx_sparsity.masks.holds import tiling_holds

__all__ = ["ScoreError", "compute_mask", "tiling_holds"]
