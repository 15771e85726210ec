"""The codes of torchao's tensors: read as the gate reads them, made, and mended."""

from typing import Any

import torch
from torch import Tensor
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

from fx_sparsity.patterns import Role
from fx_sparsity.quantization.backend import BackendError
from fx_sparsity.quantization.grid import Grid
from fx_sparsity.verification.stored import StoredWeight

FLOAT_CODES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
INTEGER_CODES = (torch.int8, torch.uint8)


@torch.no_grad()
def mend_empty_scales(weight: Any) -> None:
    """Make zeros of blocks that are all zero: torchao divides them by a float8 scale of zero."""
    if _has_codes(weight) and weight.qdata.dtype in FLOAT_CODES:
        empty = weight.scale == 0
        weight.scale.masked_fill_(empty, 1)
        codes = weight.qdata.to(torch.float32)
        weight.qdata.copy_(codes.masked_fill(_spread(empty, codes.shape), 0))


def tensor_of_codes(codes: Tensor, scales: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """One of torchao's weight-only tensors, of codes and scales as they are.

    Codes of 8 bits with one scale a row are what `Int8WeightOnlyConfig` makes, whose scales are
    float32; others what `IntxWeightOnlyConfig` does.

    Args:
        codes: int8 [out, in].
        scales: float32 [out, groups], where groups divide a row.
        grid: that they are of.
        dtype: that the tensor stands for.
    """
    width = codes.shape[1]
    if grid.bits == 8 and scales.shape[1] == 1:
        zeros = torch.zeros_like(scales, dtype=torch.int8)
        return Int8Tensor(codes, scales, [1, width], dtype, zero_point=zeros)
    scales = scales.to(grid.scale_dtype)
    return IntxUnpackedToInt8Tensor(
        codes,
        scales,
        torch.zeros_like(scales, dtype=torch.int8),
        getattr(torch, f"int{grid.bits}"),
        (1, width // scales.shape[1]),
        dtype,
        None,
    )


def read_tensor(fqn: str, tensor: Any, roles: tuple[Role, ...] | None = None) -> StoredWeight:
    """One of torchao's tensors, under the name `fqn`.

    Integer codes are read as they are. Float8 codes are read as their values, which float32 holds
    exactly; both of their zeros are zero. `(code - zero_point) * scale`, rounded to the dtype of
    the tensor, is what its own `dequantize` returns. Tensors that keep codes in another layout,
    such as packed 4-bit ones, are read as an `obstacle`, and nothing about their values is known.

    Args:
        fqn: of the parameter or buffer that holds it.
        tensor: as `is_torchao` has it.
        roles: of its axes, where they are known.
    """
    if not _has_codes(tensor):
        kind = type(tensor).__name__

        def refuse(values: Tensor) -> None:
            raise BackendError(f"{fqn}: codes of a {kind} cannot be written")

        return StoredWeight(
            fqn,
            fqn,
            kind,
            "layout of its own",
            torch.full((), torch.nan, device=tensor.device).expand(tensor.shape),
            refuse,
            scale=torch.ones((), device=tensor.device),
            zero_point=torch.zeros((), device=tensor.device),
            obstacle=f"codes of a {kind} cannot be read",
            roles=roles,
        )
    codes: Tensor = tensor.qdata
    scale: Tensor = tensor.scale
    zero_point = getattr(tensor, "zero_point", None)
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=torch.int8)

    @torch.no_grad()
    def write(values: Tensor) -> None:
        codes.copy_(values)

    in_float = codes.dtype in FLOAT_CODES
    dtype = getattr(tensor, "target_dtype", codes.dtype)
    return StoredWeight(
        fqn,
        fqn,
        str(dtype).removeprefix("torch."),
        _scheme(codes, scale, zero_point),
        codes.detach().to(torch.float32) if in_float else codes.detach().clone(),
        write,
        _spread(scale.detach(), codes.shape),
        _spread(zero_point.detach(), codes.shape),
        None if in_float else _code_range(dtype, getattr(tensor, "reduce_range", False)),
        roles=roles,
    )


def _has_codes(tensor: Any) -> bool:
    """Whether a tensor stores one code an element, with scales that tile it."""
    codes, scale = getattr(tensor, "qdata", None), getattr(tensor, "scale", None)
    return (
        isinstance(codes, Tensor)
        and isinstance(scale, Tensor)
        and codes.dtype in (*INTEGER_CODES, *FLOAT_CODES)
        and codes.shape == tensor.shape
        and scale.ndim == codes.ndim
        and all(n and size % n == 0 for size, n in zip(codes.shape, scale.shape, strict=True))
    )


def _spread(values: Tensor, shape: torch.Size) -> Tensor:
    """Values of blocks, broadcastable against a tensor of `shape` that the blocks tile."""
    for dim, (blocks, size) in enumerate(zip(values.shape, shape, strict=True)):
        if 1 < blocks < size:
            values = values.repeat_interleave(size // blocks, dim)
    return values


def _scheme(codes: Tensor, scale: Tensor, zero_point: Tensor) -> str:
    """Such as `per-group symmetric, 1x32`."""
    kind = "float" if zero_point.is_floating_point() else "integer"
    mapping = f"affine ({kind} zero point)" if bool(zero_point.any()) else "symmetric"
    block = [size // n for size, n in zip(codes.shape, scale.shape, strict=True)]
    split = [dim for dim, blocks in enumerate(scale.shape) if blocks > 1]
    if not split:
        return f"per-tensor {mapping}"
    if len(split) == 1 and block[split[0]] == 1:
        return f"per-channel {mapping}, axis {split[0]}"
    return f"per-group {mapping}, {'x'.join(map(str, block))}"


def _code_range(dtype: torch.dtype, reduced: bool) -> tuple[int, int]:
    """Smallest and largest code of an integer dtype, of 1 to 8 bits; halved where reduced."""
    name = str(dtype).removeprefix("torch.")
    levels = 2 ** int(name.removeprefix("u").removeprefix("int"))
    low, high = (0, levels - 1) if name.startswith("u") else (-levels // 2, levels // 2 - 1)
    return (low // 2, high // 2) if reduced else (low, high)
