"""The packing "block": whole blocks of 16 or 32 outputs, those that are not all zero.

For weights pruned in blocks, from 16 x 1 up to 32 x 32 and beyond. A weight takes its density times
its size, and an index of 4 bytes a block.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.kernels import panels
from fx_sparsity.kernels.panels import LANES, PackingError

_BLOCKS = ((2, 16), (2, 8), (2, 4), (1, 1))
"""Panels and steps of the blocks that kernels know, the largest first: a block of one step is read
output by output, larger ones serve two panels with each activation."""

_SLACK = 1.02
"""How much more than the smallest blocks larger ones may store, being faster."""

_INDEX_BYTES = 4


class BlockPacking:
    """Panels of 16 outputs cut into blocks of steps; those with a non-zero are kept, densely.

    Parts:
        values: [blocks, steps, panels, 16, group] of the weight's dtype: the kept blocks, row of
            blocks by row of blocks. Steps and panels of a block are one of (16, 2), (8, 2), (4, 2)
            and (1, 1), whichever stores least, larger ones before smaller. Where blocks reach over
            the weight's edge, they hold zeros.
        index: int32 [blocks], the position of each along the inputs, in blocks.
        offsets: int64 [rows of blocks + 1], where each row's blocks begin, and where the last end.
    """

    name = "block"
    operator = "block_linear.default"
    parts = ("values", "index", "offsets")

    def refusal(self, weight: Tensor) -> str | None:
        """Why nothing would be left out; None where some block is zero."""
        if reason := panels.refusal(weight):
            return reason
        if bool(_kept(panels.to_panels(weight), 1, 1).all()):
            group = panels.GROUP[weight.dtype]
            return (
                f"no block of {LANES} outputs x {group} inputs is zero, the smallest for "
                f"{weight.dtype}; bitmask takes any zeros"
            )
        return None

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Pack [out, in]; zero is what compares equal to it, so -0.0 as well."""
        steps = panels.to_panels(weight)
        steps = torch.where(steps != 0, steps, steps.new_zeros(()))
        sizes = {block: _bytes(steps, *block) for block in _BLOCKS}
        height, width = next(b for b in _BLOCKS if sizes[b] <= _SLACK * min(sizes.values()))
        kept = _kept(steps, height, width)
        return {
            "values": _cut(steps, height, width)[kept].contiguous(),
            "index": kept.nonzero()[:, 1].to(torch.int32).contiguous(),
            "offsets": pad(kept.sum(1).cumsum(0), (1, 0)),
        }

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense weight: exact where it was kept, +0.0 elsewhere."""
        values, index, offsets = (parts[name] for name in self.parts)
        _, width, height, lanes, group = values.shape
        rows, columns = _grid(shape, dtype, height, width)
        blocks = values.new_zeros((rows * columns, *values.shape[1:]))
        # The row of each block: how many rows end before it or where it stands.
        position = torch.arange(index.shape[0], device=index.device)
        row = torch.searchsorted(offsets[1:], position, right=True)
        blocks = blocks.index_copy(0, row * columns + index, values)
        grid = blocks.view(rows, columns, width, height, lanes, group).permute(0, 3, 1, 2, 4, 5)
        steps = grid.reshape(rows * height, columns * width, lanes, group)
        return panels.from_panels(steps, shape)

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError unless a kernel can read `parts` safely, as an [out, in] weight."""
        panels.expect_parts(parts, self.parts)
        values, index, offsets = (parts[name] for name in self.parts)
        group = panels.GROUP[dtype]
        blocks = [(s, p, LANES, group) for p, s in _BLOCKS]
        if tuple(values.shape[1:]) not in blocks:
            raise PackingError(
                f"values have shape {list(values.shape)}, expected [blocks, steps, panels, "
                f"{LANES}, {group}] with one of {blocks}"
            )
        panels.expect("values", values, tuple(values.shape), dtype)
        rows, columns = _grid(shape, dtype, values.shape[2], values.shape[1])
        panels.expect("index", index, (values.shape[0],), torch.int32)
        panels.expect("offsets", offsets, (rows + 1,), torch.int64)
        panels.expect_rows_of_blocks(index, offsets, columns)
        inside = self.unpack(parts, shape, dtype).count_nonzero()
        if int(inside) != int(values.count_nonzero()):
            raise PackingError(f"values hold elements outside of {list(shape)}")


def _cut(steps: Tensor, height: int, width: int) -> Tensor:
    """[panels, groups, 16, group] -> [rows, columns, width, height, 16, group], edges zeros."""
    count, groups, lanes, group = steps.shape
    full = pad(steps, (0, 0, 0, 0, 0, -groups % width, 0, -count % height))
    grid = full.view(-1, height, full.shape[1] // width, width, lanes, group)
    return grid.permute(0, 2, 3, 1, 4, 5)


def _kept(steps: Tensor, height: int, width: int) -> Tensor:
    """Which blocks of a grid are not all zero."""
    return (_cut(steps, height, width) != 0).flatten(2).any(2)


def _bytes(steps: Tensor, height: int, width: int) -> int:
    """What a weight takes in blocks of `height` panels and `width` steps."""
    block = height * width * steps[0, 0].nbytes + _INDEX_BYTES
    return int(_kept(steps, height, width).sum()) * block


def _grid(shape: torch.Size, dtype: torch.dtype, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of blocks."""
    count, groups = panels.panel_count(shape), panels.group_count(shape, dtype)
    return panels.ceil_div(count, height), panels.ceil_div(groups, width)
