"""The C++ mask operators: which weights they cover, and how they are called."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fx_sparsity._native import MASKS
from fx_sparsity.masks.blocks import zeros_of_whole
from fx_sparsity.masks.rank import INFINITIES, NAN, Rank, ScoreError
from fx_sparsity.patterns import Tiling

_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
_MASKS = (*_WEIGHTS, torch.bool)


class Geometry(NamedTuple):
    """A tiling as the operators take it: [batch, height, width], blocks in the last two."""

    batch: int
    height: int
    width: int
    block_height: int
    block_width: int
    dense: bool


def geometry(shape: Sequence[int], tiling: Tiling) -> Geometry | None:
    """The tiling with neighbouring dimensions merged; None if more than three remain.

    Two dimensions merge where blocks cut neither, or span the whole of the second.
    """
    dims: list[tuple[int, int]] = []
    for size, extent in zip(shape, tiling.extents, strict=True):
        if dims and (extent == size or extent == dims[-1][1] == 1):
            outer = dims.pop()
            size, extent = outer[0] * size, outer[1] * extent
        dims.append((size, extent))
    dims = [(1, 1)] * (3 - len(dims)) + dims
    if len(dims) > 3 or dims[0][1] != 1:
        return None
    (batch, _), (height, block_height), (width, block_width) = dims
    dense = tiling.remainder == "dense"
    return Geometry(batch, height, width, block_height, block_width, dense)


def covers(x: Tensor) -> bool:
    """Whether the operators can read `x`, made contiguous; subclasses may not even have data."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return plain and x.device.type == "cpu" and x.dtype in _WEIGHTS and MASKS.ready()


def has_nan(x: Tensor) -> bool:
    """Whether `x`, which `covers` accepts, holds a NaN."""
    return torch.ops.fx_sparsity_masks.has_nan(x.detach().contiguous())


def pack_mask(mask: Tensor, bits: Tensor) -> bool | None:
    """Pack a mask as `masks.bits.pack_mask` does.

    Args:
        mask: any.
        bits: uint8, one bit for each of its elements.

    Returns:
        Whether all elements are zeros and ones; None where the operators do not cover the mask.
    """
    plain = type(mask) is Tensor and mask.layout == torch.strided and mask.is_contiguous()
    if not plain or mask.device.type != "cpu" or mask.dtype not in _MASKS:
        return None
    return torch.ops.fx_sparsity_masks.pack_mask(mask, bits) if MASKS.ready() else None


def is_traced(x: Tensor) -> bool:
    """Whether `x` stands for others, or what is done with it is looked at by torch."""
    return is_functorch_wrapped_tensor(x) or _get_current_dispatch_mode() is not None


def apply_mask(x: Tensor, keep: Tensor, in_place: bool = False) -> Tensor | None:
    """`x` with zeros where `keep` is False, as `torch.where` gives it, but vectorized.

    Args:
        x: floating.
        keep: boolean, of the shape of `x`.
        in_place: write into `x` itself.

    Returns:
        Contiguous; None where the operators do not cover `x`.
    """
    plain = x.is_contiguous() and keep.is_contiguous() and keep.shape == x.shape
    if not plain or keep.device != x.device or not covers(x) or is_traced(x) or is_traced(keep):
        return None
    out = x if in_place else torch.empty_like(x)
    torch.ops.fx_sparsity_masks.apply_mask(x, keep, out)
    return out


def write_mask(x: Tensor, tiling: Tiling, level: float, rank: Rank, out: Tensor) -> bool:
    """Write the mask of `x`, which `covers` accepts, into `out`.

    Args:
        x: weights or scores, not empty.
        tiling: fits the shape of `x`.
        level: share of blocks to drop.
        rank: how elements rank.
        out: of the shape of `x`, any dtype and layout.

    Returns:
        False where the operators do not cover the tiling; then nothing was written.

    Raises:
        ScoreError: `x` holds a NaN, or a block both inf and -inf; `out` is as it was.
    """
    shape = geometry(x.shape, tiling)
    if shape is None:
        return False
    direct = out.dtype in _MASKS and out.device == x.device and out.is_contiguous()
    mask = out if direct else torch.empty(x.shape, dtype=torch.bool)
    _write(x.detach().contiguous(), shape, tiling, level, rank, mask)
    if not mask.is_inference():
        # As torch's own operators do, so that a backward pass notices that its mask is gone.
        torch.autograd.graph.increment_version(mask)
    if mask is not out:
        out.copy_(mask)
    return True


def _write(
    x: Tensor, shape: Geometry, tiling: Tiling, level: float, rank: Rank, mask: Tensor
) -> None:
    ops = torch.ops.fx_sparsity_masks
    if tiling.block_size == 1 and tiling.zeros == "all":
        if not ops.drop_elements(x, rank is Rank.VALUE, round(level * x.numel()), mask):
            raise ScoreError(NAN)
        return
    grid = tiling.grid(x.shape)
    chosen = tiling.chosen(level, torch.Size(grid).numel())
    sizes = zip(grid, tiling.extents, x.shape, strict=True)
    has_edges = any(n * extent < size for n, extent, size in sizes)  # they belong to no block
    if has_edges and ops.has_nan(x):
        raise ScoreError(NAN)
    if tiling.zeros == "all":
        ranked = ops.drop_blocks(x, rank, chosen, *shape, mask)
    else:
        zeros, count_missing = zeros_of_whole(tiling, level), tiling.zeros == "level"
        ranked = ops.drop_within(x, rank, chosen, zeros, count_missing, *shape, mask)
    if not ranked:
        raise ScoreError(NAN if ops.has_nan(x) else INFINITIES)
