"""4-bit codes of which at most two of every four neighbouring inputs are kept: 3 bits a weight."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.kernels import group_scales, int4, panels
from fx_sparsity.kernels.panels import LANES, PackingError, ceil_div, expect, expect_parts

_N, _M = 2, 4
_PLACES = torch.tensor(
    [
        ([i for i in range(_M) if kept >> i & 1] + [i for i in range(_M) if not kept >> i & 1])[:_N]
        for kept in range(2**_M)
    ]
).sort(-1)[0]
"""[16, 2]: for four bits that say what is kept, these or, where they are fewer, zeros as well."""
_PADDING = 16
"""Bytes that a kernel may read past the last step."""


class NMInt4Packing:
    """Six bits a kept code, of which two say where it stood: no mask is needed.

    Parts:
        values: uint8 [panels * steps * 48 + 16]: for each step of 8 inputs and each of 16 outputs
            four numbers of 6 bits, the first in the lowest: two of the first four inputs, and two
            of the others. The lower two bits are the input of the four, the upper four the code. A
            place where nothing is kept holds the zero point, and one input is there once. What may
            be read past the end is zeros.
        zero_points: int8 [panels, groups, 16]; or [0] where all are 0.
    """

    name = "nm_int4"
    operator = "nm_linear.int4"
    parts = ("values", "zero_points")

    def refusal(self, weight: Tensor, zero_point: Tensor | None = None) -> str | None:
        """Why `weight` does not consist of 4-bit codes that follow 2:4; None if it does."""
        if reason := int4.refusal(weight, zero_point):
            return reason
        fours = pad(weight, (0, -weight.shape[1] % _M)).unflatten(1, (-1, _M))
        if int(fours.count_nonzero(-1).amax()) > _N:
            return "its zeros do not follow 2:4 along the inputs; bitmask_int4 takes any zeros"
        return None

    def pack(self, weight: Tensor, zero_point: Tensor | None = None) -> dict[str, Tensor]:
        """Pack [out, in] that is not refused."""
        if reason := self.refusal(weight, zero_point):
            raise PackingError(f"{self.name}: {reason}")
        bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)
        which = ((_fours(weight) != 0) * bits).sum(-1, dtype=torch.uint8)
        place = _PLACES.to(weight.device)[which.int()]
        code = _fours(int4.codes_of(weight, zero_point)).gather(-1, place) & 15
        fields = (code.int() << 2 | place.int()).flatten(-2)  # [panels, steps, 16, 4]
        bits = (fields << torch.tensor([0, 6, 12, 18], dtype=torch.int32)).sum(-1, keepdim=True)
        values = (bits >> torch.tensor([0, 8, 16])).to(torch.uint8).flatten()
        return {
            "values": pad(values, (0, _PADDING)),
            "zero_points": int4.zero_points_part(zero_point),
        }

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What codes have beyond their zero point, int8 [out, in]; `dtype` is of no account."""
        place, codes = _fields(parts["values"], shape)
        zero_points = parts["zero_points"]
        if zero_points.numel():
            codes = codes - _by_fours(zero_points, shape)
        found = codes.new_zeros((*codes.shape[:-1], _M)).scatter(-1, place, codes)
        return int4.from_steps(found.flatten(-2), shape)

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError unless a kernel can read `parts` safely, as an [out, in] weight."""
        expect_parts(parts, self.parts)
        size = panels.panel_count(shape) * ceil_div(shape[1], 8) * LANES * 3
        expect("values", parts["values"], (size + _PADDING,), torch.uint8)
        if parts["values"][size:].count_nonzero():
            raise PackingError("values do not end in zeros")
        group_scales.expect_zero_points(parts["zero_points"], shape)
        place, _ = _fields(parts["values"], shape)
        if bool((place[..., 0] >= place[..., 1]).any()):
            raise PackingError("values keep an input twice, or in another order")


def _fours(codes: Tensor) -> Tensor:
    """int8 [out, in] -> [panels, steps, 16, 2, 4], edges 0."""
    return int4.to_steps(codes).unflatten(-1, (2, _M))


def _fields(values: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Places, int64, and signed codes, int8: [panels, steps, 16, 2, 2]."""
    triples = values[:-_PADDING].view(-1, ceil_div(shape[1], 8), LANES, 3).int()
    device = values.device
    bits = (triples << torch.tensor([0, 8, 16], dtype=torch.int32, device=device)).sum(-1)
    shifts = torch.tensor([0, 6, 12, 18], device=device)
    fields = ((bits.unsqueeze(-1) >> shifts) & 63).unflatten(-1, (2, 2))
    return fields & 3, int4.signed((fields >> 2).to(torch.uint8))


def _by_fours(zero_points: Tensor, shape: torch.Size) -> Tensor:
    """Zero points in panels, broadcastable against what `_fields` gives."""
    count = ceil_div(shape[1], 8) // zero_points.shape[1] if zero_points.shape[1] > 1 else 1
    return zero_points.repeat_interleave(count, 1)[..., None, None]
