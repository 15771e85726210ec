"""The operators of the packings, as torch sees them: schema, fake, gradient, plain torch.

They are defined here, in Python, with plain torch for every device. On the first call on a CPU
that loads the C++ library, whose kernels are then found instead, here and in whatever program was
compiled or exported before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fx_sparsity.kernels import group_scales
from fx_sparsity.kernels.activations import ACTIVATIONS, activation_gradient, quantize
from fx_sparsity.kernels.native import cpu_kernel
from fx_sparsity.kernels.packings import PACKINGS, Packing

NAMESPACE = "fx_sparsity"

Linear = Callable[..., Tensor]

_OPERATORS: dict[str, Linear] = {}
"""Name and overload -> operator, looked up once."""


def linear_operator(packing: Packing) -> Linear:
    """The operator that multiplies by a packed weight.

    Schema, after x [..., in] and the packing's parts:
        scale: fp32 [out], of int8 or float8 codes; of 4-bit codes fp32 or bf16 [panels, groups,
            16], see `group_scales`; None for other weights.
        row_sums: int32 [out], sums of the codes of each output, or, of 4-bit codes, fp32 [out],
            sums of what they stand for; None unless activations are quantized to integers.
        bias: of the dtype of x, [out]; or None.
        in_features, out_features: the shape of the weight.
        quantize_input: "none", or one of `QUANTIZERS`.
        activation: one of `ACTIVATIONS`.

    Returns [..., out] in the dtype of x. Sums run in fp32, or int32 where activations are
    quantized, and are rounded once, after the activation. The gradient of quantized activations
    is that of the same weight without their rounding.
    """
    return _OPERATORS[packing.operator]


def _define(packing: Packing) -> None:
    """Register the operator of `packing`."""
    parts = ", ".join(f"Tensor {name}" for name in packing.parts)
    name = f"{NAMESPACE}::{packing.operator}".removesuffix(".default")
    count = len(packing.parts)
    torch.library.define(
        name,
        f"(Tensor x, {parts}, Tensor? scale, Tensor? row_sums, Tensor? bias, int in_features, "
        "int out_features, str quantize_input, str activation) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    @torch.library.impl(name, "CompositeExplicitAutograd")
    def run(x: Tensor, *rest: Any) -> Tensor:
        if kernel := cpu_kernel(name, x):
            return kernel(x, *rest)
        return plain_linear(packing, x, *rest)

    @torch.library.register_fake(name)
    def fake(x: Tensor, *rest: Any) -> Tensor:
        inputs, outputs = rest[count + 3 : count + 5]
        expect_input(x, inputs)
        return x.new_empty((*x.shape[:-1], outputs))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [value if isinstance(value, Tensor) else None for value in inputs[: count + 4]]
        ctx.save_for_backward(*tensors)
        ctx.rest = inputs[count + 4 :]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *parts, scale, row_sums, bias = ctx.saved_tensors
        inputs, outputs, quantizer, activation = ctx.rest
        if activation != "none":
            rest = (scale, row_sums, bias, inputs, outputs, quantizer, "none")
            grad = activation_gradient(activation, grad, linear_operator(packing)(x, *parts, *rest))
        needs = ctx.needs_input_grad
        to_x = to_bias = None
        if needs[0]:
            weight = _dense(packing, parts, scale, torch.Size((outputs, inputs)))
            to_x = (grad.float() @ weight).to(x.dtype)
        if needs[count + 3]:
            to_bias = grad.float().flatten(0, -2).sum(0).to(bias.dtype)
        return (to_x, *[None] * (count + 2), to_bias, *[None] * 4)

    torch.library.register_autograd(name, backward, setup_context=setup_context)
    operator, overload = packing.operator.split(".")
    packet = getattr(getattr(torch.ops, NAMESPACE), operator)
    _OPERATORS[packing.operator] = getattr(packet, overload)


def plain_linear(packing: Packing, x: Tensor, *rest: Any) -> Tensor:
    """What the operator of `packing` does, in plain torch and on any device."""
    count = len(packing.parts)
    parts, (scale, _, bias, inputs, outputs, quantizer, activation) = rest[:count], rest[count:]
    expect_input(x, inputs)
    shape = torch.Size((outputs, inputs))
    if quantizer == "none" or not x.numel():
        y = linear(x.float(), _dense(packing, parts, scale, shape))
    else:
        codes, x_scale, zero_point = quantize(x, quantizer)
        weight = _unpacked(packing, parts, shape)
        codes = codes.double() - zero_point
        if scale.dim() == 1:
            # Exact: sums of products of 8-bit numbers fit into the 53 bits of a double.
            y = linear(codes, weight.double()).float() * (x_scale * scale)
        else:
            factors = weight.double() * group_scales.expanded(scale, shape)
            y = linear(codes, factors).float() * x_scale
    if bias is not None:
        y = y + bias.float()
    return ACTIVATIONS[activation](y).to(x.dtype)


def _unpacked(packing: Packing, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The weight in its own dtype, which is that of the part `values`."""
    named = dict(zip(packing.parts, parts, strict=True))
    return packing.unpack(named, shape, named["values"].dtype)


def _dense(
    packing: Packing, parts: Sequence[Tensor], scale: Tensor | None, shape: torch.Size
) -> Tensor:
    """The weight in fp32, scaled if it consists of codes."""
    weight = _unpacked(packing, parts, shape).float()
    return weight if scale is None else weight * group_scales.expanded(scale, shape)


def expect_input(x: Tensor, in_features: int) -> None:
    """Raise where an operator cannot take activations `x`.

    Raises:
        TypeError: x is neither fp32 nor bf16, nor, on CUDA, fp16.
        ValueError: its last dimension is not `in_features`.
    """
    half = x.dtype == torch.float16 and x.device.type == "cuda"
    if x.dtype not in (torch.float32, torch.bfloat16) and not half:
        raise TypeError(f"activations are {x.dtype}, expected float32 or bfloat16")
    if not x.dim() or x.shape[-1] != in_features:
        raise ValueError(f"activations are {list(x.shape)}, expected [..., {in_features}]")


for _packing in PACKINGS.values():
    _define(_packing)
