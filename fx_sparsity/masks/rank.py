"""What makes one element rank below another."""

from enum import IntEnum

import torch
from torch import Tensor

from fx_sparsity.errors import FxSparsityError

NAN = "contains NaN, which has no rank"
INFINITIES = "a block's mean score is NaN: it holds both inf and -inf"


class ScoreError(FxSparsityError, ValueError):
    """Scores that cannot be ranked: NaN, or not a floating dtype."""


class Rank(IntEnum):
    """What is ranked: scores as they are, or weights by a norm that is never stored.

    The numbers are those of the C++ operators.
    """

    VALUE = 0
    MAGNITUDE = 1
    SQUARE = 2

    def scores(self, x: Tensor) -> Tensor:
        """Scores of single elements: at least float32, ordered as this rank orders them.

        Squares rank single elements as magnitudes do, and magnitudes neither under- nor overflow.
        """
        x = x.float() if x.dtype.itemsize < 4 else x
        return x if self is Rank.VALUE else x.abs()

    def terms(self, x: Tensor) -> Tensor:
        """What a block's mean is taken of, in float64, where squares of float32 are exact enough.

        No float32 is so small or so large that its square leaves float64's range.
        """
        x = x.double()
        if self is Rank.VALUE:
            return x
        return x.abs() if self is Rank.MAGNITUDE else x.square()


def check_floating(x: Tensor) -> None:
    """Raise `ScoreError` unless `x` is floating."""
    if not x.is_floating_point():
        raise ScoreError(f"scores must be floating, found {x.dtype}")


def any_nan(x: Tensor) -> Tensor:
    """Whether `x` holds a NaN: boolean tensor of no dimensions, on the device of `x`.

    A sum would not do: it is NaN for infinities of both signs, too.
    """
    return torch.isnan(x).any()
