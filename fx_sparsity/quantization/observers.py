"""Observers whose zero is a code.

The quantizers' scheme for embeddings, `per_channel_affine_float_qparams`, keeps the zero point as a
fraction (`-min / scale`). No code then dequantizes to zero, and every pruned value comes back as
noise. Two changes cure it: the observed range always contains zero, and the zero point is rounded.
"""

from typing import Any

import torch
from torch import Tensor


class IntegerZeroPoint:
    """Mixin in front of a per-channel min-max observer: ranges contain zero, zero points are whole.

    For a row whose values span zero the error grows by at most half a step at the ends of its
    range. A row far from zero pays for the longer range.
    """

    min_val: Tensor
    max_val: Tensor

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
        return scale, zero_point.round()


EMBEDDING_SPEC: dict[str, Any] = {
    "qscheme": torch.per_channel_affine_float_qparams,
    "ch_axis": 0,
}
"""How embeddings are quantized: one scale and one zero point a row."""
