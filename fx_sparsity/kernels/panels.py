"""Panels of 16 outputs, the layout that every packing shares.

A kernel holds 16 outputs in one vector, so that nothing has to be summed across lanes. Along the
inputs it takes as many elements at once as the processor multiplies in one 32-bit lane: the
group, which is 1 element of fp32, 2 of bf16 or 4 of int8. One step of a panel is a group of inputs
for 16 outputs: 16 x 1, 16 x 2 or 16 x 4 elements, 64 bytes, output by output.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.errors import FxSparsityError

LANES = 16
_BYTES_READ = 64  # by a kernel at once, from any value on
GROUP = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}


class PackingError(FxSparsityError, ValueError):
    """Packed parts that no weight packs to; a kernel must not read them."""


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def panel_count(shape: torch.Size) -> int:
    """Panels of an [out, in] weight."""
    return ceil_div(shape[0], LANES)


def group_count(shape: torch.Size, dtype: torch.dtype) -> int:
    """Groups of inputs of an [out, in] weight."""
    return ceil_div(shape[1], GROUP[dtype])


def refusal(weight: Tensor) -> str | None:
    """Why `weight` cannot lie in panels, in words; None if it can."""
    if weight.dim() != 2:
        return f"the weight has {weight.dim()} dimensions, not [out, in]"
    if weight.dtype not in GROUP:
        return f"the weight is {weight.dtype}; kernels take float32, bfloat16 and int8"
    if weight.layout != torch.strided:
        return f"the weight is {weight.layout}, not dense"
    if not weight.numel():
        return f"the weight has no elements: {list(weight.shape)}"
    return None


def to_panels(weight: Tensor) -> Tensor:
    """[out, in] -> [panels, groups, 16, group], edges filled with zeros."""
    group = GROUP[weight.dtype]
    rows, columns = weight.shape
    full = pad(weight, (0, -columns % group, 0, -rows % LANES))
    panels = full.view(-1, LANES, full.shape[1] // group, group)
    return panels.permute(0, 2, 1, 3).contiguous()


def from_panels(panels: Tensor, shape: torch.Size) -> Tensor:
    """Undo `to_panels`."""
    count, groups, lanes, group = panels.shape
    full = panels.permute(0, 2, 1, 3).reshape(count * lanes, groups * group)
    return full[: shape[0], : shape[1]].contiguous()


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [..., 8 n] -> uint8 [..., n], lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)).to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Undo `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()


def padding(dtype: torch.dtype) -> int:
    """Elements that a kernel may read past the last packed value."""
    return _BYTES_READ // dtype.itemsize


def expect(name: str, part: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise PackingError unless `part` is contiguous and has `shape` and `dtype`."""
    if part.dtype != dtype:
        raise PackingError(f"{name} is {part.dtype}, expected {dtype}")
    if tuple(part.shape) != shape:
        raise PackingError(f"{name} has shape {list(part.shape)}, expected {list(shape)}")
    if not part.is_contiguous():
        raise PackingError(f"{name} is not contiguous")


def expect_parts(parts: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Raise PackingError unless `parts` are exactly those of `names`, on one device."""
    if set(parts) != set(names):
        raise PackingError(f"parts are {sorted(parts)}, expected {sorted(names)}")
    if len({part.device for part in parts.values()}) > 1:
        where = ", ".join(f"{name} on {part.device}" for name, part in parts.items())
        raise PackingError(f"parts lie on several devices: {where}")


def expect_rows_of_blocks(index: Tensor, offsets: Tensor, columns: int) -> None:
    """Raise PackingError unless blocks lie in rows of `columns`, each once, in ascending order.

    Args:
        index: int32 [blocks], the position of each in its row.
        offsets: int64 [rows + 1], where each row's blocks begin, and where the last end.
        columns: blocks of a row.
    """
    ends = int(offsets[0]) == 0 and int(offsets[-1]) == len(index)
    if not ends or bool((offsets.diff() < 0).any()):
        raise PackingError("offsets do not lead from the first block to the last")
    if bool(((index < 0) | (index >= columns)).any()):
        raise PackingError(f"index leads out of the {columns} blocks of a row")
    starts = torch.zeros(len(index) + 1, dtype=torch.bool, device=index.device)
    starts[offsets] = True
    if bool(((index.diff() <= 0) & ~starts[1 : len(index)]).any()):
        raise PackingError("index does not increase within a row")
