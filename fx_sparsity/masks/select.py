"""Exact selection: the k smallest, never one more or less, lowest index first among equals."""

import torch
from torch import Tensor


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
    threshold = torch.kthvalue(scores, k).values
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
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
    order = scores.sort(dim=1, stable=True).indices
    if last is not None:
        order = order.gather(1, last.gather(1, order).sort(dim=1, stable=True).indices)
    rank = torch.arange(scores.shape[1], device=scores.device)
    chosen = rank < (k.unsqueeze(1) if isinstance(k, Tensor) else k)
    return torch.empty_like(scores, dtype=torch.bool).scatter_(1, order, chosen.expand_as(order))
