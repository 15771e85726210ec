"""4-bit codes of which whole blocks of 32 outputs times 32 inputs are zero."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.kernels import group_scales, int4, panels
from fx_sparsity.kernels.panels import LANES, ceil_div, expect, expect_parts

_SIZE = 32
_STEPS = _SIZE // 8


class BlockInt4Packing:
    """The blocks that are not all zero, densely: 4 bits a weight, and an index of 4 bytes.

    Parts:
        values: uint8 [blocks, 4, 2, 64]: row of blocks by row of blocks; 4 steps of 8 inputs, 2
            panels, and the bytes of "dense_int4". Where blocks reach over the weight's edge, they
            hold zeros.
        index: int32 [blocks], the position of each along the inputs, in blocks.
        offsets: int64 [rows of blocks + 1], where each row's blocks begin, and where the last end.
        zero_points: int8 [panels, groups, 16]; or [0] where all are 0.
    """

    name = "block_int4"
    operator = "block_linear.int4"
    parts = ("values", "index", "offsets", "zero_points")

    def refusal(self, weight: Tensor, zero_point: Tensor | None = None) -> str | None:
        """Why nothing would be left out, or these are no 4-bit codes; None where it can be."""
        if reason := int4.refusal(weight, zero_point):
            return reason
        if bool((_cut(int4.to_steps(weight)) != 0).flatten(2).any(-1).all()):
            return f"no block of {_SIZE} x {_SIZE} is zero; bitmask_int4 takes any zeros"
        return None

    def pack(self, weight: Tensor, zero_point: Tensor | None = None) -> dict[str, Tensor]:
        """Pack [out, in] that is not refused."""
        kept = (_cut(int4.to_steps(weight)) != 0).flatten(2).any(-1)
        codes = _cut(int4.to_steps(int4.codes_of(weight, zero_point)))[kept]
        return {
            "values": int4.to_bytes(codes).flatten(3),
            "index": kept.nonzero()[:, 1].to(torch.int32).contiguous(),
            "offsets": pad(kept.sum(1).cumsum(0), (1, 0)),
            "zero_points": int4.zero_points_part(zero_point),
        }

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What codes have beyond their zero point, int8 [out, in]; `dtype` is of no account."""
        rows, columns = _grid(shape)
        place = _place(parts, columns)
        blocks = int4.from_bytes(parts["values"].unflatten(-1, (LANES, 4)))
        grid = blocks.new_zeros((rows * columns, *blocks.shape[1:]))
        kept = torch.zeros(rows * columns, dtype=torch.bool, device=place.device)
        codes = _whole(grid.index_copy(0, place, blocks), rows, columns, shape)
        kept = kept.index_fill(0, place, True)
        mask = _whole(kept.view(-1, 1, 1, 1, 1).expand_as(grid), rows, columns, shape)
        values = int4.without_zero_points(codes, parts["zero_points"], shape)
        return torch.where(mask, values, values.new_zeros(()))

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError unless a kernel can read `parts` safely, as an [out, in] weight."""
        expect_parts(parts, self.parts)
        values, index, offsets, zero_points = (parts[name] for name in self.parts)
        rows, columns = _grid(shape)
        blocks = values.numel() // (_STEPS * 2 * 4 * LANES)
        expect("values", values, (blocks, _STEPS, 2, 4 * LANES), torch.uint8)
        expect("index", index, (blocks,), torch.int32)
        expect("offsets", offsets, (rows + 1,), torch.int64)
        panels.expect_rows_of_blocks(index, offsets, columns)
        group_scales.expect_zero_points(zero_points, shape)


def _grid(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of blocks."""
    return ceil_div(panels.panel_count(shape), 2), ceil_div(ceil_div(shape[1], 8), _STEPS)


def _cut(steps: Tensor) -> Tensor:
    """[panels, steps, 16, 8] -> [rows, columns, 4, 2, 16, 8], edges 0."""
    full = pad(steps, (0, 0, 0, 0, 0, -steps.shape[1] % _STEPS, 0, len(steps) % 2))
    grid = full.unflatten(1, (-1, _STEPS)).unflatten(0, (-1, 2))
    return grid.permute(0, 2, 3, 1, 4, 5)


def _whole(blocks: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    """[rows * columns, 4, 2, 16, 8] -> [out, in]."""
    grid = blocks.unflatten(0, (rows, columns)).permute(0, 3, 1, 2, 4, 5)
    return int4.from_steps(grid.flatten(2, 3).flatten(0, 1), shape)


def _place(parts: Mapping[str, Tensor], columns: int) -> Tensor:
    """int64: where each block is in the grid."""
    position = torch.arange(len(parts["index"]), device=parts["index"].device)
    row = torch.searchsorted(parts["offsets"][1:], position, right=True)
    return row * columns + parts["index"]
