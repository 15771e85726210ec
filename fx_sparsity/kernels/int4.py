"""Packings of 4-bit codes whose scales are one a group of inputs.

A weight is given as what its codes have beyond their zero point: int8 [out, in], 0 for what is
zero; and the zero points, int8 [out, groups], where not all of them are 0. Codes and zero points
are signed: from -8 to 7.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.kernels import group_scales, panels
from fx_sparsity.kernels.panels import LANES, ceil_div, expect, expect_parts

_STEP = 8
"""Inputs of a step, which takes 64 bytes."""
_LOW, _HIGH = -8, 7


def codes_of(weight: Tensor, zero_point: Tensor | None) -> Tensor:
    """The codes of [out, in]."""
    return (
        weight if zero_point is None else weight + group_scales.expanded(zero_point, weight.shape)
    )


def refusal(weight: Tensor, zero_point: Tensor | None) -> str | None:
    """Why a weight does not consist of 4-bit codes, in words; None if it does."""
    if reason := panels.refusal(weight):
        return reason
    if weight.dtype != torch.int8:
        return f"the weight is {weight.dtype}, not 4-bit codes"
    codes = codes_of(weight, zero_point)
    low, high = int(codes.amin()), int(codes.amax())
    if low < _LOW or high > _HIGH:
        return f"codes reach from {low} to {high}, four bits hold {_LOW} to {_HIGH}"
    if zero_point is not None and bool(((zero_point < _LOW) | (zero_point > _HIGH)).any()):
        return f"zero points lie outside of {_LOW} to {_HIGH}, what four bits hold"
    return None


def zero_points_part(zero_point: Tensor | None) -> Tensor:
    """The part `zero_points`: in panels, or [0] where there are none."""
    none = torch.zeros(0, dtype=torch.int8)
    return none if zero_point is None else group_scales.to_panels(zero_point)


def without_zero_points(codes: Tensor, zero_points: Tensor, shape: torch.Size) -> Tensor:
    """Codes [out, in] less their zero points, which are those of a part."""
    return codes - group_scales.expanded(zero_points, shape) if zero_points.numel() else codes


def to_steps(codes: Tensor) -> Tensor:
    """int8 [out, in] -> [panels, steps, 16, 8], edges 0."""
    full = pad(codes, (0, -codes.shape[1] % _STEP, 0, -codes.shape[0] % LANES))
    steps = full.view(-1, LANES, full.shape[1] // _STEP, _STEP)
    return steps.permute(0, 2, 1, 3).contiguous()


def from_steps(steps: Tensor, shape: torch.Size) -> Tensor:
    """Undo `to_steps`."""
    count, number, lanes, step = steps.shape
    full = steps.permute(0, 2, 1, 3).reshape(count * lanes, number * step)
    return full[: shape[0], : shape[1]].contiguous()


def signed(halves: Tensor) -> Tensor:
    """uint8, of which the lower four bits count -> int8, the signed codes that they are."""
    return (halves.view(torch.int8) << 4) >> 4


def to_bytes(steps: Tensor) -> Tensor:
    """int8 [..., 16, 8] -> uint8 [..., 16, 4]: the first four codes in the lower halves."""
    halves = steps.contiguous().view(torch.uint8) & 15
    return halves[..., :4] | halves[..., 4:] << 4


def from_bytes(values: Tensor) -> Tensor:
    """Undo `to_bytes`."""
    return signed(torch.cat([values, values >> 4], -1))


class DenseInt4Packing:
    """All codes, two a byte: 4 bits a weight, and its share of a scale.

    Parts:
        values: uint8 [panels, steps * 64]: for each step of 8 inputs and each of 16 outputs four
            bytes, whose lower halves are the first four codes.
        zero_points: int8 [panels, groups, 16]; or [0] where all are 0.
    """

    name = "dense_int4"
    operator = "dense_linear.int4"
    parts = ("values", "zero_points")

    def refusal(self, weight: Tensor, zero_point: Tensor | None = None) -> str | None:
        """Why `weight` does not consist of 4-bit codes; None if it does."""
        return refusal(weight, zero_point)

    def pack(self, weight: Tensor, zero_point: Tensor | None = None) -> dict[str, Tensor]:
        """Pack [out, in] that is not refused."""
        values = to_bytes(to_steps(codes_of(weight, zero_point)))
        return {"values": values.flatten(1), "zero_points": zero_points_part(zero_point)}

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What codes have beyond their zero point, int8 [out, in]; `dtype` is of no account."""
        values = parts["values"].view(-1, ceil_div(shape[1], _STEP), LANES, 4)
        codes = from_steps(from_bytes(values), shape)
        return without_zero_points(codes, parts["zero_points"], shape)

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError unless a kernel can read `parts` safely, as an [out, in] weight."""
        expect_parts(parts, self.parts)
        size = ceil_div(shape[1], _STEP) * LANES * 4
        expect("values", parts["values"], (panels.panel_count(shape), size), torch.uint8)
        group_scales.expect_zero_points(parts["zero_points"], shape)
