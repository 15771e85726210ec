"""2:4 on CUDA: torch's own semi-structured tensors, which run on cuSPARSELt or CUTLASS."""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

# Private, for CUTLASS's layout on the CPU too; torch's tensors are made on CUDA alone.
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from fx_sparsity.kernels.panels import PackingError, expect, expect_parts

_FLOAT8 = torch.float8_e4m3fn
_INPUTS = {torch.float16: 64, torch.bfloat16: 64, torch.int8: 128, _FLOAT8: 64}
"""Dtype -> what the inputs have to be a multiple of, for either library, as torch 2.13 has them."""
_OUTPUTS = 32
_POSITIONS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int8: torch.int32,
    _FLOAT8: torch.int32,
}
"""Dtype of a weight -> dtype of CUTLASS's positions, 4 bits for every four inputs."""
_SUMS = {torch.int8: torch.int32, _FLOAT8: torch.float32}
"""Dtype of codes -> dtype in which products of them are summed up."""


class SemiStructuredPacking:
    """The packing "semi_structured": 2:4 as the libraries on CUDA want it; 9 bits a weight in bf16.

    Parts:
        values: [out, in / 2] of the weight's dtype, the two that are kept of every four inputs; for
            cuSPARSELt, which is taken where torch has it, followed by positions in its own layout.
        positions: CUTLASS's positions, int16 [out, in / 16], or int32 [out, in / 32] for codes; for
            cuSPARSELt int16 [0].

    Only cuSPARSELt multiplies float8; CUTLASS's layout serves it elsewhere than on CUDA.
    """

    name = "semi_structured"
    operator = "nm_linear.semi_structured"
    parts = ("values", "positions")

    def refusal(self, weight: Tensor) -> str | None:
        """Why torch has no such kernel for the weight; None if it has."""
        if weight.dim() != 2:
            return f"the weight has {weight.dim()} dimensions, not [out, in]"
        if weight.device.type != "cuda":
            return (
                f"torch has semi-structured kernels on CUDA alone, the weight is on {weight.device}"
            )
        if weight.dtype not in _INPUTS:
            return f"the weight is {weight.dtype}; kernels take float16, bfloat16, int8 and float8"
        if weight.dtype == _FLOAT8 and (reason := _float8_refusal(weight.device)):
            return reason
        if weight.dtype == _FLOAT8 and bool(weight.float().isnan().any()):
            return "it has NaN, which products would spread"
        if not follows_2_4(weight):
            return "its zeros are not 2:4 along the inputs"
        outputs, inputs = weight.shape
        if not weight.numel() or outputs % _OUTPUTS or inputs % _INPUTS[weight.dtype]:
            return (
                f"the weight is {list(weight.shape)}, which has to be a multiple of "
                f"{[_OUTPUTS, _INPUTS[weight.dtype]]}"
            )
        return None

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Pack [out, in] that is not refused, on CUDA; elsewhere in CUTLASS's layout."""
        bits = _bits(weight)
        bits = torch.where(bits != 0, bits, bits.new_zeros(())).contiguous()
        if weight.is_cuda and torch.backends.cusparselt.is_available():
            return _compressed(bits.view(weight.dtype))
        values, positions = sparse_semi_structured_from_dense_cutlass(bits)
        return {"values": values.view(weight.dtype), "positions": positions}

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense weight: exact where it was kept, +0.0 elsewhere."""
        if is_cusparselt(parts) and dtype == _FLOAT8:
            one = torch.eye(shape[1], device=parts["values"].device).to(dtype)
            dense = code_product(parts, one.t())
            return torch.where(dense == 0, 0.0, dense).to(dtype)
        if is_cusparselt(parts):
            return to_dense(torch_tensor(parts, shape))
        dense = sparse_semi_structured_to_dense_cutlass(_bits(parts["values"]), parts["positions"])
        return torch.where(dense != 0, dense, dense.new_zeros(())).view(dtype)

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError unless a kernel can read `parts` safely, as an [out, in] weight."""
        expect_parts(parts, self.parts)
        values, positions = (parts[name] for name in self.parts)
        outputs, inputs = shape
        if is_cusparselt(parts):
            if not values.is_cuda:
                raise PackingError(f"values for cuSPARSELt are on {values.device}, not on CUDA")
            if values.dtype != dtype or values.numel() < outputs * inputs // 2:
                raise PackingError(
                    f"{values.numel()} values of {values.dtype}, expected {dtype} for {list(shape)}"
                )
            return
        expect("values", values, (outputs, inputs // 2), dtype)
        kind = _POSITIONS[dtype]
        expect("positions", positions, (outputs, inputs // (8 * kind.itemsize)), kind)
        kept = _bits(self.unpack(parts, shape, dtype)).count_nonzero()
        if int(kept) != int(_bits(values).count_nonzero()):
            raise PackingError("positions put two values into one place")


def _bits(values: Tensor) -> Tensor:
    """Float8 as int8 that is zero at the same places, since torch lacks operators for float8."""
    if values.dtype != _FLOAT8:
        return values
    bits = values.view(torch.int8)
    return torch.where(bits == -128, 0, bits)  # which is -0.0


def _compressed(weight: Tensor) -> dict[str, Tensor]:
    """The parts of a 2:4 weight on CUDA, for cuSPARSELt."""
    packed = SparseSemiStructuredTensorCUSPARSELT.from_dense(weight).packed
    assert packed is not None
    return {"values": packed, "positions": torch.empty(0, dtype=torch.int16, device=weight.device)}


@cache
def _float8_refusal(device: torch.device) -> str | None:
    """Why there is no product of float8 on a device; None if there is.

    It is tried: that depends on the device, on cuSPARSELt, and on how torch was built.
    """
    if not torch.backends.cusparselt.is_available():
        return "float8 needs cuSPARSELt, which this torch does not have"
    try:
        zeros = torch.zeros(_OUTPUTS, _INPUTS[_FLOAT8], device=device).to(_FLOAT8)
        code_product(_compressed(zeros), zeros.t())
    except torch.OutOfMemoryError:  # which says nothing of the device
        raise
    except RuntimeError as error:
        return f"torch refuses float8 on {device}: {str(error).splitlines()[0]}"
    return None


def code_product(parts: Mapping[str, Tensor], columns: Tensor) -> Tensor:
    """Packed codes times others: [in, tokens] -> [out, tokens], not scaled.

    Private operators of torch, since its tensors return int8 for int8, and have one scale in all
    for float8.

    Args:
        parts: of int8 or float8 codes.
        columns: of their dtype, the transpose of what is contiguous; tokens a multiple of 16.

    Returns:
        int32, exact; or fp32.
    """
    values, positions = parts["values"], parts["positions"]
    sums = _SUMS[values.dtype]
    if is_cusparselt(parts):
        return torch._cslt_sparse_mm(values, columns, out_dtype=sums)
    return torch._sparse_semi_structured_mm(values, positions, columns, out_dtype=sums)


def is_cusparselt(parts: Mapping[str, Tensor]) -> bool:
    """Whether cuSPARSELt compressed the parts, rather than CUTLASS."""
    return not parts["positions"].numel()


def torch_tensor(parts: Mapping[str, Tensor], shape: torch.Size) -> Any:
    """The parts as one of torch's semi-structured tensors, which shares their memory."""
    rest: Any = (None, None, None)  # what is kept for products with the transposed weight
    if is_cusparselt(parts):
        return SparseSemiStructuredTensorCUSPARSELT(shape, parts["values"], None, *rest)
    return SparseSemiStructuredTensorCUTLASS(shape, parts["values"], parts["positions"], *rest)


def semi_structured_refusal(weight: Tensor) -> str | None:
    """Why a dense [out, in] weight cannot be one of torch's semi-structured tensors.

    Asked in this order: the zeros, the device, and what torch itself has kernels for, which depends
    on the dtype (float16, bfloat16, int8, float32, and float8 on recent devices) and sizes.

    Returns:
        None if it can.
    """
    if not follows_2_4(weight):
        return "its zeros are not 2:4 along the inputs"
    if weight.device.type != "cuda":
        return f"torch has semi-structured kernels on CUDA alone, the weight is on {weight.device}"
    try:
        to_sparse_semi_structured(weight[:0].new_zeros(weight.shape))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"torch refuses it: {error}"
    return None


def follows_2_4(weight: Tensor) -> bool:
    """Whether every four neighbours along the inputs of a [out, in] weight hold two zeros."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight == 0).view(len(weight), -1, 4).sum(2) >= 2).all())


def put_semi_structured(module: nn.Linear, alg_id: int = 0) -> None:
    """Compress the weight of a module, in place, to half of its bytes and the positions.

    Args:
        module: its weight is not refused.
        alg_id: which of cuSPARSELt's algorithms multiplies; torch that cannot choose has 0 alone.
    """
    chosen: dict[str, Any] = {"alg_id": alg_id} if alg_id else {}
    weight = to_sparse_semi_structured(module.weight.detach().contiguous(), **chosen)
    module.weight = nn.Parameter(weight, requires_grad=False)


def is_semi_structured(tensor: object) -> TypeGuard[Tensor]:
    """Whether a weight is one of torch's semi-structured tensors."""
    return isinstance(tensor, SparseSemiStructuredTensor)


def to_dense(weight: Tensor) -> Tensor:
    """What a semi-structured tensor stands for: exact for every kept value, +0.0 for the others."""
    return torch.where((dense := weight.to_dense()) == 0, dense.new_zeros(()), dense)
