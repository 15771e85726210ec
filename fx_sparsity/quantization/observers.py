"""Observers whose zero is a code.

The quantizers' scheme for embeddings, `per_channel_affine_float_qparams`, keeps the zero point as a
fraction (`-min / scale`). No code then dequantizes to zero, and every pruned value comes back as
noise. Two changes cure it: the observed range always contains zero, and the zero point is whole.

The mixins go in front of an observer of `torch.ao.quantization` or of torchao's pt2e.
"""

from typing import Any

import torch
from torch import Tensor

EMBEDDING_SPEC: dict[str, Any] = {
    "qscheme": torch.per_channel_affine_float_qparams,
    "ch_axis": 0,
}
"""How embeddings are quantized: one scale and one zero point a row."""

_TOP = 255  # the largest code of an embedding; the smallest is 0
_ROWS_AT_ONCE = 1 << 16  # bounds the memory that `zero_cost` takes


def _whole(scale: Tensor, zero_point: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Make zero points in 0..`top` whole, and scales so much wider that no value is clipped.

    A zero point goes to the next code towards the middle; then the farther end of the range decides
    how much wider the scale must be: by one part in `(top - 1) / 2` at most. Rounding to the
    nearest code instead would clip that end by up to half a step, in many values where a table was
    clipped before.
    """
    lower = zero_point < top / 2
    slack = 1e-4  # float32 misses whole numbers by less
    whole = torch.where(lower, (zero_point - slack).ceil(), (zero_point + slack).floor())
    wider = torch.where(lower, (top - zero_point) / (top - whole), zero_point / whole)
    return scale * wider.clamp(min=1), whole


class IntegerZeroPoint:
    """Mixin for a per-channel min-max observer: ranges contain zero, zero points are whole.

    For a row whose values span zero, steps grow by at most 1/127, and no value is off by more than
    half a step, as with the stock observer. That one represents both ends of a row without error,
    and this one only one of them: of `d` values drawn from a continuous distribution, the root mean
    square error is about `sqrt((d - 1) / (d - 2))` times the stock one's. Measured on whole tables:
    1% more for 64 values a row, 4% for 16, 9% for 8, and less than the stock one's where many
    values are zero. A row far from zero pays for the longer range, see `zero_cost`.
    """

    min_val: Tensor
    max_val: Tensor
    quant_max: int

    def forward(self, x: Tensor) -> Tensor:
        """Observe `x`."""
        x = super().forward(x)  # type: ignore[misc]
        with torch.no_grad():
            self.min_val.clamp_(max=0)
            self.max_val.clamp_(min=0)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales, and whole zero points in their own (float) dtype."""
        scale, zero_point = super().calculate_qparams()  # type: ignore[misc]
        return _whole(scale, zero_point, self.quant_max)


class FarRowsAlone:
    """Mixin for a per-channel min-max observer: whole zero points where a row's values span zero.

    Those rows are quantized as by `IntegerZeroPoint`. Rows whose values are all of one sign keep
    the stock observer's scale and fractional zero point, and its error; which in pt2e is more than
    twice what it need be, because torch's operator there cuts codes off instead of rounding them.
    They have no code for zero: sparsify-first never needs one, because a row with a masked value
    spans zero; masking their codes, as quantize-first does, raises `ZeroNotRepresentableError`.
    """

    min_val: Tensor
    max_val: Tensor
    quant_max: int

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points, in their own (float) dtype."""
        scale, zero_point = super().calculate_qparams()  # type: ignore[misc]
        whole_scale, whole = _whole(scale, zero_point, self.quant_max)
        far = (self.min_val > 0) | (self.max_val < 0)
        return torch.where(far, scale, whole_scale), torch.where(far, zero_point, whole)


class IgnoreZeros:
    """Mixin for a per-tensor observer of weights: exact zeros, such as masked values, do not count.

    Zero stays a code: per-tensor schemes see to that whatever was observed. Not for activations,
    whose zeros are values like others.

    Changes nothing for min-max observers, whose ranges contain zero anyway. A `HistogramObserver`
    chooses where to clip by the share of values beyond, so that many zeros make it clip too much of
    the rest. For the 37 linears of all-MiniLM-L6-v2, the error of the kept values with this is 0.95
    of that without in the median (0.26 to 1.02) at 90% zeros and an affine scheme; in symmetric
    schemes and at 50% it is 1.00, and up to 1.16 at worst. So it is an option; no default
    configuration uses it, nor a histogram for weights. `tests/benchmarks/observers.txt` has all
    figures.

    Raises:
        TypeError: on observing, for a scheme that is not per tensor.
    """

    qscheme: torch.qscheme

    def forward(self, x: Tensor) -> Tensor:
        """Observe the values of `x` that are not zero; all of them where none is."""
        if self.qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            raise TypeError(
                f"{type(self).__name__}: expected a per-tensor scheme, found {self.qscheme}; "
                "per-channel min-max ranges do not depend on zeros, leave IgnoreZeros out"
            )
        kept = x.detach()[x.detach() != 0]
        super().forward(kept if kept.numel() else x)  # type: ignore[misc]
        return x


@torch.no_grad()
def zero_cost(weight: Tensor) -> Tensor:
    """What it costs each row of an embedding that zero is a code.

    Root mean square error of `IntegerZeroPoint` over that of the stock observer, both with 8-bit
    codes. Around 1 where a row's values span zero, with chance deciding to which side; large where
    they lie far from zero: about 7 for values from N(3, 0.1). Errors below the rounding of float32
    count as that rounding, so that a constant row costs 1. `FarRowsAlone` leaves rows that do not
    span zero as they are with the stock observer. In pt2e the stock error is twice as large, and
    the cost half as high, see there.

    Args:
        weight: rows x dim, floating.

    Returns:
        float64, one number a row.

    Raises:
        ValueError: the weight has another shape, or is not floating.
    """
    if weight.ndim != 2 or not weight.shape[1] or not weight.is_floating_point():
        raise ValueError(
            f"expected a floating weight of rows x dim, found {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    return torch.cat([_zero_cost(rows.double()) for rows in weight.split(_ROWS_AT_ONCE)])


def _zero_cost(rows: Tensor) -> Tensor:
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    ours = _root_mean_square_error(
        rows, *_whole(*_qparams(low.clamp(max=0), high.clamp(min=0)), _TOP)
    )
    stock = _root_mean_square_error(rows, *_qparams(low, high))
    rounding = rows.abs().amax(1) * torch.finfo(torch.float32).eps
    least = rounding.clamp(min=torch.finfo(torch.float32).tiny)
    return ours.maximum(least) / stock.maximum(least)


def _qparams(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scheme's own scale and zero point; a scale of 1, as in torch, where a range is tiny."""
    scale = (high - low) / _TOP
    scale = torch.where(scale > torch.finfo(torch.float32).eps, scale, 1.0)
    return scale, -low / scale


def _root_mean_square_error(rows: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    codes = (rows / scale + zero_point).round().clamp(0, _TOP)
    return ((codes - zero_point) * scale - rows).square().mean(1).sqrt()
