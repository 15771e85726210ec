"""Exact selection: the k smallest, never one more or less, lowest index first among equals."""

import math

import torch
from torch import Tensor

_SAMPLE = 1 << 14
_PAIRWISE = 32  # rows up to this length are ranked by comparing every pair


def k_smallest(scores: Tensor, k: int) -> Tensor:
    """Mark the `k` smallest elements.

    Args:
        scores: one-dimensional, no NaN.
        k: how many, in 0..len(scores).

    Returns:
        Boolean tensor like `scores` with exactly `k` elements True. Among equal scores those with
        the lowest index are marked.
    """
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.device.type != "cpu":
        return _up_to(scores, torch.kthvalue(scores, k).values, k)
    threshold = _kth(scores, k)
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(torch.count_nonzero(chosen))]] = True
    return chosen


def k_smallest_per_row(scores: Tensor, k: Tensor | int, last: Tensor | None = None) -> Tensor:
    """Mark the smallest elements of each row.

    Args:
        scores: [rows, elements], no NaN.
        k: how many in each row: one integer, or an integer tensor [rows].
        last: boolean [rows, elements]; where True, ranked after everything else, infinities too.

    Returns:
        Boolean tensor like `scores`; row r has exactly `k[r]` elements True, lowest index first
        among equals.
    """
    length = scores.shape[1]
    limit = k.unsqueeze(1) if isinstance(k, Tensor) else k
    if last is None and length <= _PAIRWISE:
        return _ranks(scores) < limit
    if last is None and isinstance(k, int):
        if not 0 < k < length:
            return torch.full_like(scores, k > 0, dtype=torch.bool)
        return _up_to(scores, torch.kthvalue(scores, k, dim=1, keepdim=True).values, k)
    order = scores.sort(dim=1, stable=True).indices
    if last is not None:
        order = order.gather(1, last.gather(1, order).sort(dim=1, stable=True).indices)
    chosen = torch.arange(length, device=scores.device) < limit
    return torch.empty_like(scores, dtype=torch.bool).scatter_(1, order, chosen.expand_as(order))


def _up_to(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """The `k` smallest along the last dimension, given the k-th; no host synchronisation."""
    below = scores < threshold
    ties = scores == threshold
    allowed = k - below.sum(-1, keepdim=True)
    return below | (ties & (ties.cumsum(-1) <= allowed))


def _kth(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest: a sample brackets it, so that only a few elements are partitioned."""
    n = scores.numel()
    sample = scores[:: max(1, n // _SAMPLE)].sort().values
    share = k / n
    middle = share * len(sample)
    spread = 4 * math.sqrt(len(sample) * share * (1 - share)) + 2
    low = sample[max(0, int(middle - spread))]
    high = sample[min(len(sample) - 1, int(middle + spread))]
    below = scores < low
    candidates = scores[(scores <= high).logical_xor_(below)]
    rank = k - int(torch.count_nonzero(below))
    if 1 <= rank <= len(candidates):
        return torch.kthvalue(candidates, rank).values
    return torch.kthvalue(scores, k).values


def _ranks(scores: Tensor) -> Tensor:
    """How many elements of its row go before each element: smaller ones, and earlier equal ones."""
    columns = scores.t().contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for i, column in enumerate(columns):
        ordered = columns[i + 1 :] >= column
        ranks[i + 1 :] += ordered
        ranks[i] += ordered.logical_not().sum(0, dtype=torch.uint8)
    return ranks.t()
