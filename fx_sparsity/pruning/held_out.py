"""Batches that are held out: weights are judged by them, and updates that overfit are damped."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fx_sparsity.graph.example_inputs import InputError
from fx_sparsity.pruning.batches import Batch
from fx_sparsity.pruning.methods import Statistics
from fx_sparsity.pruning.methods.statistics import images
from fx_sparsity.pruning.methods.where import select

_WHOLE = 0.9  # of an update: from here on it is left as it is


def hold_out(batches: Sequence[Batch], share: float) -> list[Batch]:
    """The batches, some of them marked as held out.

    Raises:
        ValueError: not a share.
        InputError: too few batches to hold one out.
    """
    if not 0 <= share < 1:
        raise ValueError(f"held_out: expected a share in [0, 1), found {share!r}")
    if not share:
        return list(batches)
    if len(batches) < 2:
        raise InputError(
            f"held_out: expected at least 2 batches, one to judge by, found {len(batches)}; "
            "pass the data in smaller batches"
        )
    places = spread(len(batches), share)
    return [replace(batch, held_out=place in places) for place, batch in enumerate(batches)]


def spread(count: int, share: float) -> set[int]:
    """Places of what is held out among `count`: over all of them, which may be in some order.

    At least one, and never all.
    """
    held = min(count - 1, max(1, round(share * count)))
    return {(2 * i + 1) * count // (2 * held) for i in range(held)}


def damped(dense: Tensor, mask: Tensor, kept: Tensor, stats: Statistics) -> tuple[Tensor, Tensor]:
    """The update of kept values, as much of it as held-out inputs bear out.

    Between the dense values of what is kept (t = 0) and the updated ones (t = 1), the error
    ||(W - V(t)) X||^2 is a parabola in t; with G = X X^T, A = W - V(0) and B = V(1) - V(0) its
    least is at t = <A G, B> / <B G, B>. One number for each matrix, which cannot overfit.

    Args:
        dense: W, float32 [groups, out, in].
        mask: boolean, of that shape.
        kept: V(1), of that shape, zero where the mask is.
        stats: of the held-out inputs, as `relative_error` takes them.

    Returns:
        V(t), and t: float32 [groups]; 1 where nearly the whole update is best, or no input was
        seen, and V is V(1) there.
    """
    plain = select(mask, dense)
    change = kept - plain
    image = images(change, stats)
    size = _dots(image, change)
    share = (_dots(image, dense - plain) / size).clamp(0, 1)
    share = torch.where((size > 0) & (share < _WHOLE), share, 1.0)
    if bool((share == 1).all()):
        return kept, share
    return torch.lerp(plain, kept, share.view(-1, 1, 1)), share


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products of matrices: [groups]."""
    return torch.linalg.vecdot(a, b).sum(-1)
