"""The mask engine: weights or scores, a tiling and a level in; a mask out. Knows no model."""

from fx_sparsity.masks.detect import tightest_pattern
from fx_sparsity.masks.engine import compute_mask, contains_nan
from fx_sparsity.masks.global_level import GlobalCut, global_cut, global_masks
from fx_sparsity.masks.holds import tiling_holds
from fx_sparsity.masks.rank import Rank, ScoreError

__all__ = [
    "GlobalCut",
    "Rank",
    "ScoreError",
    "compute_mask",
    "contains_nan",
    "global_cut",
    "global_masks",
    "tightest_pattern",
    "tiling_holds",
]
