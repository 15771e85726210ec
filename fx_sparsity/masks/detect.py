"""Which pattern do zeros follow? Read off the zeros alone, however they came about."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from fx_sparsity.masks.blocks import real_elements, to_blocks
from fx_sparsity.patterns import (
    NM,
    Block,
    Channels,
    Pattern,
    PatternError,
    Role,
    Rows,
    SparsityConfig,
    Unstructured,
)

_EXPLAINED = 0.95
"""Share of the zeros that whole blocks have to hold, so that a pattern explains them. Rounding
leaves strays: in an int8 weight about one kept value in a hundred."""


def tightest_pattern(zero: Tensor, roles: Sequence[Role]) -> SparsityConfig | None:
    """The most regular pattern that zeros follow, and how many of its blocks they fill.

    Tried in this order: whole rows and channels, blocks from the largest to the smallest, N:M from
    the sparsest. Blocks count if those that are all zero hold at least 95% of the zeros, N:M if
    every group has its zeros.

    Args:
        zero: boolean, True where the weight is zero.
        roles: of its axes.

    Returns:
        The configuration, `unstructured` where nothing more regular fits; None without a zero.
    """
    total, elements = int(zero.count_nonzero()), zero.numel()
    if not total:
        return None
    for pattern in _blocks():
        try:
            tiling = pattern.tiling(zero.shape, roles)
        except PatternError:  # this pattern does not fit the shape
            continue
        sizes = real_elements(zero.shape, tiling.extents, zero.device)
        full = to_blocks(zero, tiling.extents, fill=0).sum(1) == sizes
        if int(sizes[full].sum()) >= _EXPLAINED * total:
            return SparsityConfig(pattern, int(full.count_nonzero()) / len(full))
    for pattern in (NM(1, 8), NM(1, 4), NM(2, 8), NM(1, 2), NM(2, 4), NM(4, 8)):
        if total < (1 - pattern.n / pattern.m) * elements:
            continue
        try:
            tiling = pattern.tiling(zero.shape, roles)
        except PatternError:
            continue
        if bool((to_blocks(zero, tiling.extents, fill=0).sum(1) >= pattern.m - pattern.n).all()):
            return SparsityConfig(pattern)
    return SparsityConfig(Unstructured(), total / elements)


def _blocks() -> Iterator[Pattern]:
    """Patterns of whole blocks, the most regular first."""
    yield Rows()
    yield Channels()
    for size in (32, 16, 8, 4):
        yield Block((size, size))
    for size in (16, 8, 4):
        yield Block((size, 1))
        yield Block((1, size))
    yield Block((2, 2))
