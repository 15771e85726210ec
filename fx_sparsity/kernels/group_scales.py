"""Scales of codes: one an output, or one for each group of neighbouring inputs of an output.

Groups are equal, and as long as a multiple of 8 inputs, which kernels take at once; or all inputs
are one. For kernels they lie in panels of 16 outputs: [panels, groups, 16].
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.kernels.panels import LANES, PackingError, ceil_div, expect

_STEP = 8


def refusal(scale: Tensor, shape: torch.Size) -> str | None:
    """Why [out, groups] are no scales of groups of an [out, in] weight; None if they are."""
    outputs, inputs = shape
    if scale.dim() != 2 or len(scale) != outputs or not scale.shape[1]:
        return f"scales are {list(scale.shape)}, expected [{outputs}, groups]"
    groups = scale.shape[1]
    if groups > 1 and inputs % (_STEP * groups):
        return f"{groups} groups of {inputs} inputs are not equal, and multiples of {_STEP}"
    return None


def to_panels(scale: Tensor) -> Tensor:
    """[out] or [out, groups] -> [panels, groups, 16], edges filled with zeros; any dtype."""
    by_output = scale.view(len(scale), -1)
    full = pad(by_output, (0, 0, 0, -len(scale) % LANES))
    return full.unflatten(0, (-1, LANES)).mT.contiguous()


def from_panels(scale: Tensor, outputs: int) -> Tensor:
    """Undo `to_panels`: [panels, groups, 16] -> [out, groups]."""
    return scale.mT.flatten(0, 1)[:outputs].contiguous()


def expanded(scale: Tensor, shape: torch.Size) -> Tensor:
    """Scales in any of the three forms, broadcastable against an [out, in] weight."""
    outputs, inputs = shape
    by_output = from_panels(scale, outputs) if scale.dim() == 3 else scale.view(outputs, -1)
    groups = by_output.shape[1]
    return by_output if groups == 1 else by_output.repeat_interleave(inputs // groups, 1)


def narrowed(scale: Tensor) -> Tensor:
    """In bf16 where that is exact, as scales of bf16 models are; else in fp32."""
    half, wide = scale.to(torch.bfloat16), scale.float()
    return half if torch.equal(half.float(), wide) else wide


def weighted_sums(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 [out]: the sum of what the codes of each output stand for."""
    by_output = scale.view(len(codes), -1)
    sums = codes.unflatten(1, (by_output.shape[1], -1)).sum(-1, dtype=torch.int32)
    return (sums.double() * by_output.double()).sum(1).float()


def check(scale: Tensor, zero_points: Tensor, shape: torch.Size) -> None:
    """Raise PackingError unless a kernel can read scales in panels, of an [out, in] weight.

    Args:
        scale: bf16 or fp32.
        zero_points: int8, like `scale`; or [0].
        shape: of the weight.
    """
    panels = ceil_div(shape[0], LANES)
    groups = scale.shape[1] if scale.dim() == 3 else 1
    dtype = scale.dtype if scale.dtype == torch.bfloat16 else torch.float32
    expect("scale", scale, (panels, groups, LANES), dtype)
    if reason := refusal(from_panels(scale, shape[0]), shape):
        raise PackingError(reason)
    expect_zero_points(zero_points, shape)
    if zero_points.numel() and zero_points.shape != scale.shape:
        raise PackingError(
            f"zero_points have shape {list(zero_points.shape)}, expected {list(scale.shape)}"
        )


def expect_zero_points(zero_points: Tensor, shape: torch.Size) -> None:
    """Raise PackingError unless they are int8 and in panels, or [0], and fit four bits."""
    if tuple(zero_points.shape) == (0,):
        expect("zero_points", zero_points, (0,), torch.int8)
        return
    groups = zero_points.shape[1] if zero_points.dim() == 3 else 1
    expect("zero_points", zero_points, (ceil_div(shape[0], LANES), groups, LANES), torch.int8)
    if reason := refusal(from_panels(zero_points, shape[0]), shape):
        raise PackingError(f"zero_points: {reason}")
    if int(zero_points.amin()) < -8 or int(zero_points.amax()) > 7:
        raise PackingError("zero_points lie outside of -8 to 7, what four bits hold")
