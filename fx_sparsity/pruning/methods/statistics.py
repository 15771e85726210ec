"""What calibration saw at the uses of one weight."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["input_norm", "input_mean", "gram", "gradient", "gradient_norm"]
"""Names of what can be asked for."""


@dataclass
class Statistics:
    """Sums over all uses of a weight, all batches and all tokens, in the weight's matrix form.

    In matrix form a weight is [groups, out, in]: one group but for experts and other batched
    weights; `in` runs over everything that is reduced, the positions of a convolution's kernel
    outermost. One column of inputs x, [in], is multiplied with the weight of its group as `W @ x`.

    Attributes:
        tokens: how many inputs each group got: int64, [groups].
        squares: sum of x squared: float32, [groups, in]; for `input_norm`.
        sums: sum of x: float32, [groups, in]; for `input_mean`.
        gram: sum of the outer products x x^T: float32, [groups, in, in]; for `gram`.
        gradients: sum of the loss's gradient: float32, [groups, out, in]; for `gradient`.
        gradient_squares: sum of its square, batch by batch: float32, [groups, out, in]; for
            `gradient_norm`.
    """

    tokens: Tensor
    squares: Tensor | None = None
    sums: Tensor | None = None
    gram: Tensor | None = None
    gradients: Tensor | None = None
    gradient_squares: Tensor | None = None


def images(weight: Tensor, stats: Statistics) -> Tensor:
    """W X X^T, float32 [groups, out, in], with what `relative_error` takes."""
    if stats.gram is not None:
        return weight @ stats.gram
    assert stats.squares is not None
    return weight * stats.squares.unsqueeze(1)


def relative_error(dense: Tensor, kept: Tensor, stats: Statistics) -> float:
    """`||(W - V) X|| / ||W X||` over all inputs, Frobenius norms; 0 where W X is zero.

    With G = X X^T, a squared norm is tr(W G W^T).

    Args:
        dense: W, float32 [groups, out, in].
        kept: V, of that shape.
        stats: with `gram`, or of a table with `squares`, the diagonal that is all there is of it.
    """

    def squared(weight: Tensor) -> float:
        found = torch.linalg.vecdot(images(weight, stats), weight)
        return max(0.0, float(found.sum(dtype=torch.float64)))

    whole = squared(dense)
    return float((squared(dense - kept) / whole) ** 0.5) if whole else 0.0
