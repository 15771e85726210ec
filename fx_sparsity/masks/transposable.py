"""2:4 along both axes at once, so that a weight's transpose is 2:4, too: exactly the best mask."""

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from fx_sparsity.masks.engine import contains_nan
from fx_sparsity.masks.rank import NAN, ScoreError, check_floating
from fx_sparsity.patterns import PatternError

_BLOCKS = 1 << 16  # that are looked at together
_LARGEST = 1e300


@torch.no_grad()
def transposable_mask(scores: Tensor) -> Tensor:
    """Keep two of every four along rows and along columns, so that the sum of scores is greatest.

    Blocks of 4 x 4 are independent, and each has 90 masks: all are tried. (TSENOR, arXiv
    2505.23949, is for blocks where that is too many.)

    Args:
        scores: [rows, columns], multiples of 4, floating; what is high is kept.

    Returns:
        Boolean, of that shape: True is kept. Among equal masks a block gets the first in the order
        of its rows' combinations.

    Raises:
        PatternError: another shape.
        ScoreError: NaN, or not floating.
    """
    check_floating(scores)
    if scores.ndim != 2 or scores.shape[0] % 4 or scores.shape[1] % 4:
        raise PatternError(
            "2:4 both ways needs two dimensions that are multiples of 4, "
            f"found shape {tuple(scores.shape)}"
        )
    if contains_nan(scores):
        raise ScoreError(NAN)
    down, across = scores.shape[0] // 4, scores.shape[1] // 4
    finite = scores.double().clamp(-_LARGEST, _LARGEST)  # times 0, infinity is NaN
    blocks = finite.reshape(down, 4, across, 4).transpose(1, 2).reshape(-1, 16)
    candidates = _candidates().to(scores.device)
    table = candidates.double().t()
    best = torch.cat([(part @ table).argmax(1) for part in blocks.split(_BLOCKS)])
    kept = candidates[best]
    return kept.view(down, across, 4, 4).transpose(1, 2).reshape(scores.shape)


@cache
def _candidates() -> Tensor:
    """All masks of a block, row by row: boolean [90, 16]."""
    rows = [[i in pair for i in range(4)] for pair in combinations(range(4), 2)]
    masks = torch.tensor(list(product(rows, repeat=4)))
    return masks[(masks.sum(1) == 2).all(1)].reshape(-1, 16)
