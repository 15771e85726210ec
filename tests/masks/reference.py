"""The obviously correct mask: Python's exact sums and stable sort over float64 scores."""

import math
from itertools import product

import numpy as np
import torch


def reference_mask(scores: np.ndarray, tiling, level: float) -> torch.Tensor:
    keep = np.ones(scores.shape, dtype=bool)
    blocks = []
    for place in product(*map(range, tiling.grid(scores.shape))):
        ranges = zip(place, tiling.extents, scores.shape, strict=True)
        inside = [range(p * e, min((p + 1) * e, size)) for p, e, size in ranges]
        blocks.append(list(product(*inside)))
    if (count := tiling.chosen(level, len(blocks))) < len(blocks):
        blocks.sort(key=lambda block: math.fsum(scores[i] for i in block) / len(block))
    for block in blocks[:count]:
        zeros = {"all": tiling.block_size, "level": round(level * tiling.block_size)}.get(
            tiling.zeros, tiling.zeros
        )
        if tiling.zeros == "level":  # the missing elements of a ragged block are zeros already
            zeros -= tiling.block_size - len(block)
        for i in sorted(block, key=scores.__getitem__)[: max(zeros, 0)]:
            keep[i] = False
    return torch.from_numpy(keep)


def norm_of(x: torch.Tensor, rank) -> np.ndarray:
    """Scores of weights in float64; squares of float64 are not asked for."""
    x = x.detach().double().numpy()
    return [x, np.abs(x), x * x][rank]
