"""4-bit codes with any zeros: one bit a weight, and four a code that is kept."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.kernels import group_scales, int4, panels
from fx_sparsity.kernels.native import packs_natively
from fx_sparsity.kernels.panels import PackingError, ceil_div, expect, expect_parts

_PADDING = 64
"""Bytes that a kernel may read past the last code."""


class BitmaskInt4Packing:
    """A mask, and the codes that it keeps, in two streams of half bytes.

    One stream has the codes of the first four inputs of all steps of 8 inputs, the other those of
    the other four, so that either is expanded as bytes are.

    Parts:
        mask: uint8 [panels, steps, 16]: 64 bits for the first four inputs of a step, output by
            output, lowest bit first; 64 for the others.
        values: uint8 [bytes + 64]: panel by panel the first stream in the lower halves, the second
            in the upper ones, as long as the longer of both; what may be read past the end is
            zeros.
        offsets: int64 [panels + 1], where each panel's bytes begin, and where the last end.
        zero_points: int8 [panels, groups, 16]; or [0] where all are 0.
    """

    name = "bitmask_int4"
    operator = "bitmask_linear.int4"
    parts = ("mask", "values", "offsets", "zero_points")

    def refusal(self, weight: Tensor, zero_point: Tensor | None = None) -> str | None:
        """Why `weight` does not consist of 4-bit codes; None if it does."""
        return int4.refusal(weight, zero_point)

    def pack(self, weight: Tensor, zero_point: Tensor | None = None) -> dict[str, Tensor]:
        """Pack [out, in] that is not refused; what its zero point stands for is not kept."""
        if zero_point is None and packs_natively(weight):
            return self._pack_natively(weight)
        return self._pack_plainly(weight, zero_point)

    def _pack_natively(self, weight: Tensor) -> dict[str, Tensor]:
        """Without zero points a stream is what "bitmask" makes of its inputs alone."""
        steps = ceil_div(weight.shape[1], 8)
        full = pad(weight, (0, 8 * steps - weight.shape[1])).unflatten(1, (steps, 2, 4))
        halves = [full[:, :, half].flatten(1).contiguous() for half in range(2)]
        counts = torch.empty(2, panels.panel_count(weight.shape), dtype=torch.int64)
        for half, count in zip(halves, counts, strict=True):
            torch.ops.fx_sparsity.count_panels(half, count)
        offsets = pad(counts.amax(0).cumsum(0), (1, 0))
        mask = torch.empty(2, counts.shape[1], steps, 8, dtype=torch.uint8)
        streams = weight.new_zeros(2, int(offsets[-1]))
        for half, bits, stream in zip(halves, mask, streams, strict=True):
            torch.ops.fx_sparsity.pack_panels(half, 0, 0, offsets, bits, stream)
        low, high = streams.view(torch.uint8)
        return {
            "mask": mask.permute(1, 2, 0, 3).flatten(2).contiguous(),
            "values": pad(low & 15 | high << 4, (0, _PADDING)),
            "offsets": offsets,
            "zero_points": int4.zero_points_part(None),
        }

    def _pack_plainly(self, weight: Tensor, zero_point: Tensor | None) -> dict[str, Tensor]:
        """What `pack` does, in plain torch and on any device."""
        kept = _streams(int4.to_steps(weight)) != 0
        offsets = _offsets(kept)
        place = _places(kept, offsets)[kept]
        codes = _streams(int4.to_steps(int4.codes_of(weight, zero_point)))[kept].view(torch.uint8)
        second = torch.arange(2, device=weight.device).view(-1, 1).expand_as(kept)[kept].bool()
        values = codes.new_zeros(int(offsets[-1]) + _PADDING)
        values[place[~second]] = codes[~second] & 15
        values[place[second]] |= codes[second] << 4
        return {
            "mask": panels.pack_bits(kept).flatten(2),
            "values": values,
            "offsets": offsets,
            "zero_points": int4.zero_points_part(zero_point),
        }

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What codes have beyond their zero point, int8 [out, in]; `dtype` is of no account."""
        kept = _kept(parts["mask"])
        found = parts["values"][_places(kept, parts["offsets"]).clamp(min=0)]
        halves = torch.stack([found[:, :, 0], found[:, :, 1] >> 4], 2)
        codes = int4.from_steps(_steps(int4.signed(halves)), shape)
        mask = int4.from_steps(_steps(kept), shape)
        values = int4.without_zero_points(codes, parts["zero_points"], shape)
        return torch.where(mask, values, values.new_zeros(()))

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError unless a kernel can read `parts` safely, as an [out, in] weight."""
        expect_parts(parts, self.parts)
        mask, values, offsets, zero_points = (parts[name] for name in self.parts)
        count, steps = panels.panel_count(shape), ceil_div(shape[1], 8)
        expect("mask", mask, (count, steps, 16), torch.uint8)
        expect("offsets", offsets, (count + 1,), torch.int64)
        kept = _kept(mask)
        if not torch.equal(offsets, _offsets(kept)):
            raise PackingError("offsets do not follow from the number of bits set in the mask")
        total = int(offsets[-1])
        expect("values", values, (total + _PADDING,), torch.uint8)
        if values[total:].count_nonzero():
            raise PackingError("values do not end in zeros")
        inside = int4.from_steps(_steps(kept), shape)
        if int(inside.count_nonzero()) != int(kept.count_nonzero()):
            raise PackingError(f"the mask keeps elements outside of {list(shape)}")
        group_scales.expect_zero_points(zero_points, shape)


def _streams(steps: Tensor) -> Tensor:
    """[panels, steps, 16, 8] -> [panels, steps, 2, 64]."""
    return steps.unflatten(-1, (2, 4)).transpose(2, 3).flatten(3)


def _steps(streams: Tensor) -> Tensor:
    """Undo `_streams`."""
    return streams.unflatten(-1, (-1, 4)).transpose(2, 3).flatten(3)


def _kept(mask: Tensor) -> Tensor:
    """Bool [panels, steps, 2, 64]."""
    return panels.unpack_bits(mask.unflatten(-1, (2, 8)))


def _offsets(kept: Tensor) -> Tensor:
    """int64 [panels + 1]: where the bytes of each panel begin, and the last end."""
    longest = kept.sum((1, 3)).amax(1)
    return pad(longest.cumsum(0), (1, 0))


def _places(kept: Tensor, offsets: Tensor) -> Tensor:
    """Which byte each code of [panels, steps, 2, 64] is in; of what is not kept, one before it."""
    by_stream = kept.transpose(1, 2).flatten(2).cumsum(2) - 1
    places = by_stream + offsets[:-1, None, None]
    return places.unflatten(2, (kept.shape[1], -1)).transpose(1, 2)
