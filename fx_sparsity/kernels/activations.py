"""Plain torch around the product: how activations are quantized, and what follows it.

The C++ kernels do the same in their own pass over the activations and in their epilogue.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

QUANTIZERS = {
    "token_symmetric": torch.int8,
    "token_affine": torch.int8,
    "tensor_affine": torch.int8,
    "token_float8": torch.float8_e4m3fn,
}
"""How activations are quantized, besides "none" -> dtype of the codes, theirs and the weight's."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": lambda y: gelu(y, approximate="tanh"),
    "silu": silu,
}

_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, y: grad,
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "gelu": lambda grad, y: torch.ops.aten.gelu_backward(grad, y),
    "gelu_tanh": lambda grad, y: torch.ops.aten.gelu_backward(grad, y, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
}


class Quantized(NamedTuple):
    """Codes that stand for `(codes - zero_point) * scale`."""

    codes: Tensor  # int32, or float8, of the shape of the activations
    scale: Tensor  # fp32, one a token, or one in all: [..., 1]
    zero_point: Tensor  # int32, of the shape of `scale`


def activation_gradient(activation: str, grad: Tensor, y: Tensor) -> Tensor:
    """The gradient before the activation, from that after it and the value before it."""
    return _GRADIENTS[activation](grad, y)


def quantize(x: Tensor, quantizer: str) -> Quantized:
    """Quantize activations to 8 bits, as the libraries do whose models are lowered.

    `token_float8` is that of torchao's Float8DynamicActivationFloat8Weight with PerRow: a scale a
    token, in the dtype of `x`. A token of zeros has codes of zero, where torchao's are NaN.

    `token_symmetric` and `token_affine` are those of torchao's Int8DynamicActivationInt8Weight:
    a scale a token, in the dtype of `x`; codes in [-128, 127]. `tensor_affine` is that of the
    dynamic linear in torch.ao: one scale in all, codes in [0, 127], because its kernels add two
    products in 16 bits.

    Args:
        x: [..., in], fp32 or bf16, on CUDA also fp16, not empty.
        quantizer: one of `QUANTIZERS`.
    """
    if quantizer == "token_float8":
        return _quantize_float8(x)
    if quantizer == "tensor_affine":
        return _quantize_tensor(x.float())
    low, high = -128, 127
    smallest, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if quantizer == "token_symmetric":
        reach = torch.maximum(smallest.clamp(max=0).neg(), largest.clamp(min=0))
        scale = (reach / ((high - low) / 2)).clamp(min=torch.finfo(torch.float32).eps)
        zero_point = torch.zeros_like(scale)
    else:
        smallest = smallest.clamp(max=0)
        scale = (largest.clamp(min=0) - smallest) / (high - low)
        scale = scale.clamp(min=torch.finfo(torch.float32).eps)
        zero_point = (low - (smallest / scale).round()).clamp(low, high)
    scale = scale.float()
    codes = ((x.float() * (1.0 / scale)).round() + zero_point).clamp(low, high)
    return Quantized(codes.to(torch.int32), scale, zero_point.to(torch.int32))


def _quantize_float8(x: Tensor) -> Quantized:
    dtype = QUANTIZERS["token_float8"]
    high = torch.finfo(dtype).max
    scale = (x.abs().amax(-1, keepdim=True) / high).float()
    codes = (x.float() / torch.where(scale == 0, 1.0, scale)).clamp(-high, high).to(dtype)
    return Quantized(codes, scale, torch.zeros_like(scale, dtype=torch.int32))


def _quantize_tensor(x: Tensor) -> Quantized:
    """As `ChooseQuantizationParams` in torch's QuantUtils.h chooses, in double precision."""
    high = 127
    smallest, largest = x.amin().clamp(max=0).double(), x.amax().clamp(min=0).double()
    scale = (largest - smallest) / high
    scale = torch.where((1.0 / scale.float()).isinf(), 0.1, scale)
    zero_point = (-smallest / scale).round().clamp(0, high).float().view(1)
    # Smaller ones do not fit into the 16 bits of some processors' floats.
    scale = scale.clamp(min=6.1e-5).float().view(1)
    codes = (x * (1.0 / scale) + zero_point).round().clamp(0, high)
    return Quantized(codes.to(torch.int32), scale, zero_point.to(torch.int32))
