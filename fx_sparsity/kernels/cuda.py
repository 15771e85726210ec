"""What CUDA has a kernel for: `nm_linear` with parts of the packing "semi_structured"."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fx_sparsity.kernels.activations import ACTIVATIONS, quantize
from fx_sparsity.kernels.ops import NAMESPACE, expect_input, plain_linear
from fx_sparsity.kernels.packings import PACKINGS
from fx_sparsity.kernels.semi_structured import SemiStructuredPacking, code_product, torch_tensor

_TOKENS = 16
"""The libraries take codes of a multiple of 16 tokens."""


def semi_structured_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: Tensor | None,
    row_sums: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    quantize_input: str,
    activation: str,
) -> Tensor:
    """See `ops.linear_operator`. Floating products are rounded before the activation, too."""
    expect_input(x, in_features)
    parts = {"values": values, "positions": positions}
    shape = torch.Size((out_features, in_features))
    coded = scale is not None
    if not x.numel() or (coded and quantize_input == "none"):
        rest = (scale, row_sums, bias, in_features, out_features, quantize_input, activation)
        return plain_linear(PACKINGS[SemiStructuredPacking.name], x, values, positions, *rest)
    rows = x.reshape(-1, in_features)
    if scale is None:
        y = _product(rows, parts, shape, bias)
    else:
        codes, x_scale, zero_point = quantize(rows, quantize_input)
        sums = _code_product(codes.to(values.dtype), parts, shape)
        if row_sums is not None:
            sums = sums - zero_point * row_sums
        y = sums.float() * (x_scale * scale)
        y = y if bias is None else y + bias.float()
    return ACTIVATIONS[activation](y).to(x.dtype).view(*x.shape[:-1], out_features)


def _product(
    rows: Tensor, parts: Mapping[str, Tensor], shape: torch.Size, bias: Tensor | None
) -> Tensor:
    """[tokens, in] -> [tokens, out]; torch pads the tokens."""
    return linear(rows, torch_tensor(parts, shape), bias)


def _code_product(codes: Tensor, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """int8 or float8 [tokens, in] -> int32 or fp32 [tokens, out]."""
    tokens = len(codes)
    columns = pad(codes, (0, 0, 0, -tokens % _TOKENS)).t()
    return code_product(parts, columns)[: shape[0], :tokens].t()


torch.library.impl(f"{NAMESPACE}::{SemiStructuredPacking.operator}", "CUDA", semi_structured_linear)
