"""Does a tensor of zeros obey a pattern? Read off the zeros alone, however they came about."""

from torch import Tensor

from fx_sparsity.masks.blocks import real_elements, to_blocks
from fx_sparsity.patterns import Tiling


def tiling_holds(zero: Tensor, tiling: Tiling, level: float) -> bool:
    """Whether `zero` reaches `level` in the shape that `tiling` demands.

    Further zeros do not break a pattern: a kept value may well be zero.

    Args:
        zero: boolean, True where the weight is zero.
        tiling: the pattern in storage dimensions.
        level: share of blocks that were to go, in [0, 1].
    """
    if tiling.remainder == "dense":
        extent = [n * e for n, e in zip(tiling.grid(zero.shape), tiling.extents, strict=True)]
        zero = zero[tuple(slice(size) for size in extent)]
    if tiling.block_size == 1 and tiling.zeros == "all":
        return int(zero.count_nonzero()) >= tiling.chosen(level, zero.numel())
    sizes = real_elements(zero.shape, tiling.extents, zero.device)
    zeros = to_blocks(zero, tiling.extents, fill=0).sum(1)
    wanted = tiling.zeros_in_chosen(level, sizes)
    return int((zeros >= wanted).count_nonzero()) >= tiling.chosen(level, len(sizes))
