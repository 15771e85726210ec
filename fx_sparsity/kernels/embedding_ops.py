"""The operators that look rows up in row-pruned tables, as torch sees them.

They are `row_pruned_embedding` and `row_pruned_embedding_bag` in `torch.ops.fx_sparsity`, defined
here with plain torch for every device; C++ kernels take over as in `ops.py`. Pruned rows contribute
zeros, whatever the weight of a sample; an index outside of the table is an error. Results are
summed in fp32 and rounded once. Tables have no gradient, `per_sample_weights` do.

After what is looked up, both take a table, the tensors and the columns of a `RowTable`, and the
dtype of the result, a name of `RESULTS`: AOTInductor packages of torch 2.11 hand a dtype on as
another one.
"""

from typing import Any

import torch
from torch import Tensor

from fx_sparsity.kernels.native import cpu_kernel
from fx_sparsity.kernels.row_table import RowTable

MODES = ("sum", "mean", "max")
"""How bags are reduced; the operator takes the position."""

RESULTS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""The dtypes of results, by the names that operators take."""

NO_PADDING = -1
"""The `padding_idx` of an operator that has none."""

LOOKUP, BAG = "row_pruned_embedding", "row_pruned_embedding_bag"
"""Names of the operators in `torch.ops.fx_sparsity`."""

_LOOKUP, _BAG = f"fx_sparsity::{LOOKUP}", f"fx_sparsity::{BAG}"

_TABLE = "Tensor rows, Tensor? affine, Tensor remap, int columns, str dtype"
torch.library.define(_LOOKUP, f"(Tensor indices, {_TABLE}) -> Tensor")
torch.library.define(
    _BAG,
    f"(Tensor indices, Tensor? offsets, Tensor? per_sample_weights, {_TABLE}, int mode, "
    "int padding_idx, bool include_last_offset) -> Tensor",
)


def look_up(indices: Tensor, *rest: Any) -> Tensor:
    """`row_pruned_embedding` where there is no kernel for a device."""
    if kernel := cpu_kernel(_LOOKUP, indices):
        return kernel(indices, *rest)
    *parts, dtype = rest
    table = RowTable(*parts)
    check_indices(indices, table.remap.numel())
    return table.look_up(indices, getattr(torch, dtype))


def look_up_bags(
    indices: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, *rest: Any
) -> Tensor:
    """`row_pruned_embedding_bag` where there is no kernel for a device."""
    if kernel := cpu_kernel(_BAG, indices):
        return kernel(indices, offsets, per_sample_weights, *rest)
    *parts, dtype, mode, padding_idx, include_last_offset = rest
    table, dtype = RowTable(*parts), getattr(torch, dtype)
    bags, bag = bag_of_positions(indices, offsets, include_last_offset)
    indices = indices.reshape(-1)[: len(bag)]
    check_indices(indices, table.remap.numel())
    counted = indices != padding_idx
    indices, bag = indices[counted], bag[counted]
    values = table.look_up(indices, torch.float32)
    result = values.new_zeros(bags, table.columns)
    if MODES[mode] == "max":
        where = bag.unsqueeze(1).expand_as(values)
        return result.scatter_reduce_(0, where, values, "amax", include_self=False).to(dtype)
    if per_sample_weights is not None:
        weights = per_sample_weights.reshape(-1)[: len(counted)][counted].unsqueeze(1)
        values = torch.where((table.remap[indices] >= 0).unsqueeze(1), values * weights, 0)
    result.index_add_(0, bag, values)
    if MODES[mode] == "mean":
        result /= torch.bincount(bag, minlength=bags).clamp(min=1).unsqueeze(1)
    return result.to(dtype)


torch.library.impl(_LOOKUP, "CompositeExplicitAutograd", look_up)
torch.library.impl(_BAG, "CompositeExplicitAutograd", look_up_bags)


@torch.library.register_fake(_LOOKUP)
def _fake_look_up(indices: Tensor, *rest: Any) -> Tensor:
    rows, _, _, columns, dtype = rest
    return rows.new_empty((*indices.shape, columns), dtype=getattr(torch, dtype))


@torch.library.register_fake(_BAG)
def _fake_bag(indices: Tensor, offsets: Tensor | None, *rest: Any) -> Tensor:
    _, rows, _, _, columns, dtype, _, _, include_last_offset = rest
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
    return rows.new_empty((bags, columns), dtype=getattr(torch, dtype))


def bag_of_positions(
    indices: Tensor, offsets: Tensor | None, include_last_offset: bool
) -> tuple[int, Tensor]:
    """How many bags there are, and the bag of each position up to the end of the last bag.

    Raises:
        ValueError: offsets do not begin with 0, decrease, or end beyond the indices.
    """
    device, count = indices.device, indices.numel()
    if offsets is None:
        bags, size = indices.shape
        return bags, torch.arange(bags, device=device).repeat_interleave(size)
    bounds = offsets.long()
    if not include_last_offset:
        bounds = torch.cat([bounds, bounds.new_tensor([count])])
    sizes = bounds.diff()
    starts_at_zero = not len(sizes) or int(bounds[0]) == 0
    if not starts_at_zero or bool((sizes < 0).any()) or int(bounds[-1]) > count:
        raise ValueError(
            f"expected offsets that begin with 0, never decrease and end within {count} indices"
        )
    return len(sizes), torch.arange(len(sizes), device=device).repeat_interleave(sizes)


def check_indices(indices: Tensor, size: int) -> None:
    """Raise unless all indices are within a table.

    Raises:
        IndexError: names the first that is not, its position and the table's size.
    """
    outside = ((indices < 0) | (indices >= size)).reshape(-1)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise IndexError(
            f"index {int(indices.reshape(-1)[at])} at position {at} is out of range for a table of "
            f"{size} rows"
        )


def _keep_for_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, offsets, weights, rows, affine, remap, columns, _, _, padding_idx, _ = inputs
    ctx.save_for_backward(indices, offsets, rows, affine, remap)
    ctx.rest = (columns, padding_idx)
    ctx.shape = None if weights is None else weights.shape


def _gradient_of_weights(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of `per_sample_weights`: each row against the gradient of its bag."""
    indices, offsets, *parts = ctx.saved_tensors
    columns, padding_idx = ctx.rest
    values = torch.ops.fx_sparsity.row_pruned_embedding(indices, *parts, columns, "float32")
    if offsets is None:
        in_bags = gradient.unsqueeze(1).expand_as(values)
        counted = indices != padding_idx
    else:
        # Traced as well, so that nothing may hang on what the offsets are.
        position = torch.arange(indices.shape[0], device=indices.device)
        bag = torch.bucketize(position, offsets.long(), right=True) - 1
        counted = (indices != padding_idx) & (bag < gradient.shape[0])
        in_bags = gradient[bag.clamp(max=gradient.shape[0] - 1)]
    found = torch.where(counted, (values * in_bags.float()).sum(-1), 0)
    return (None, None, found.view(ctx.shape), *[None] * 8)


torch.library.register_autograd(_BAG, _gradient_of_weights, setup_context=_keep_for_weights)
