"""Rounding what is kept to a grid of codes, so that later codes make up for earlier ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from fx_sparsity.pruning.methods.calibrated import Solution
from fx_sparsity.pruning.methods.hessian import Hessian
from fx_sparsity.pruning.methods.matrix import Layer, Refinement
from fx_sparsity.pruning.methods.where import select
from fx_sparsity.quantization.grid import Grid

_STRETCH = 128  # columns whose errors are passed on one by one, and to the others all at once
_SHRUNK = tuple(1 - i / 20 for i in range(11))
"""What scales are tried with, of the one at which nothing is cut off."""


class _Rounded(NamedTuple):
    """Rows on a grid.

    Attributes:
        codes: whole numbers, float32 [out, in]; zeros where the mask prunes.
        scales: float32 [out, groups].
    """

    codes: Tensor
    scales: Tensor


class Rounding(Refinement):
    """Pruning and quantization made up for together: kept weights go to codes, with the mask held.

    The last step of a `Pipeline`. What it gives are codes times scales, zeros exact, and
    `fx_sparsity.quantization.quantize_rounded` hands both on to torchao without rounding again.
    The error that falls is still that against the dense weight, ||(W - V) X||^2:

    1. The scale of a group is the one, of some between the largest kept magnitude over
       2^(bits - 1) - 1/2, as torchao has it, and half of that, that costs its kept weights least:
       sum of H_jj (w_j - v_j)^2.
    2. GPTQ (arXiv 2210.17323, with the factor of SparseGPT, arXiv 2301.00774, section 3.5):
       columns are rounded from left to right, and the error e of column j is made up for by the
       columns right of it, by subtracting e / U_jj * U_j, where U^T U = H^-1. What is pruned stays
       zero, which is an error like any other.
    3. Where rounding to nearest, by these scales or by torchao's, has a smaller error in a row,
       the row goes on from there.
    4. Coordinate descent: with G = (W - V) H, code j of a row becomes the one next to
       v_j + G_j / H_jj, then the scale of each group, with codes c, moves by c G / (c H c) of its
       columns. Every move is the best of its kind: the error of a row never rises.

    So no row has a larger error than what was found, rounded to nearest by torchao's scales. Groups
    whose inputs do not go together, or that no token reached, are rounded to nearest, as the notes
    tell.

    Args:
        bits: of a code, 2 to 8.
        group_size: inputs that share a scale; None where all inputs of an output do.
        passes: of coordinate descent, over all columns, from right to left and back in turn.
        damping: added to the Gram matrix's diagonal, as a share of its mean.
        scale_dtype: that scales are rounded to: torch.bfloat16 for models in bfloat16, whose
            tensors have such scales in torchao.
    """

    grid: Grid

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = 32,
        passes: int = 4,
        damping: float = 0.01,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(damping)
        if passes < 0:
            raise ValueError(f"passes: expected zero or more, found {passes!r}")
        self.grid, self.passes = Grid(bits, group_size, scale_dtype), passes

    def refine_layer(self, layer: Layer, hessian: Hessian, found: Solution) -> Solution:
        """See `Refinement.refine_layer`."""
        grid, weight = self.grid, layer.weight
        values, keep = select(found.mask, found.weight), found.mask
        root, used = hessian.root()
        plain, chosen = _scales(values, used.diagonal(), grid)
        swept = _Rounded(_sweep(values, keep, root, chosen, grid), chosen)
        del root
        matrix = used.matrix()
        best = swept
        for scales in (chosen, plain):
            best = _better(best, _nearest(values, scales, grid), weight, matrix, grid)
        for turn in range(self.passes):
            best = _descend(best, weight, keep, matrix, grid, forth=turn % 2 == 1)
            best = _rescale(best, weight, matrix, grid)
        notes = tuple(note for note in used.notes if note not in hessian.notes)
        return Solution(keep, _values(best, grid), notes, best.scales)

    def refine_apart(self, layer: Layer, found: Solution) -> Solution:
        """See `Refinement.refine_apart`."""
        values = select(found.mask, found.weight)
        _, scales = _scales(values, layer.squares, self.grid)
        rounded = _nearest(values, scales, self.grid)
        note = f"rounded to nearest: {layer.note}"
        return Solution(found.mask, _values(rounded, self.grid), (note,), scales)


def _values(rounded: _Rounded, grid: Grid) -> Tensor:
    """Codes times scales."""
    return rounded.codes * grid.spread(rounded.scales, rounded.codes.shape[1])


def _nearest(values: Tensor, scales: Tensor, grid: Grid) -> _Rounded:
    return _Rounded(grid.nearest(values, grid.spread(scales, values.shape[1])), scales)


def _scales(values: Tensor, weights: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales at which nothing is cut off, as torchao has them; and those that cost least.

    Args:
        values: float32 [out, in].
        weights: what the square of an error costs in each column, [in].
        grid: of the codes.

    Returns:
        Both float32 [out, groups]; 1 for groups that are all zero.
    """
    width, size = values.shape[1], grid.size(values.shape[1])
    missing = -width % size

    def grouped(elements: Tensor) -> Tensor:
        return torch.nn.functional.pad(elements, (0, missing)).unflatten(1, (-1, size))

    largest = grouped(values.abs()).amax(2) / (2 ** (grid.bits - 1) - 0.5)
    plain = _in_dtype(largest, grid)
    plain = torch.where(plain > 0, plain, 1.0)
    best, least = plain, torch.full_like(plain, torch.inf)
    for factor in _SHRUNK:
        scales = _in_dtype(plain * factor, grid)
        error = values - _values(_nearest(values, scales, grid), grid)
        cost = grouped(error.square_() * weights).sum(2)
        better = cost < least
        best, least = torch.where(better, scales, best), torch.where(better, cost, least)
    return plain, best


def _in_dtype(scales: Tensor, grid: Grid) -> Tensor:
    """Scales as they can be stored; zero where that is none that can be divided by."""
    stored = scales.to(grid.scale_dtype).float()
    return torch.where(stored >= torch.finfo(grid.scale_dtype).smallest_normal, stored, 0.0)


def _sweep(values: Tensor, keep: Tensor, root: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Codes by GPTQ with the mask held; see `sweep` for how stretches follow one another.

    Args:
        values: kept ones and zeros, float32 [out, in].
        keep: the mask, boolean [out, in].
        root: upper triangular R with R R^T = H, float32 [in, in].
        scales: float32 [out, groups].
        grid: of the codes.
    """
    width = values.shape[1]
    spread = grid.spread(scales, width)
    codes, change = torch.empty_like(values), torch.empty_like(values)
    for start in range(0, width, _STRETCH):
        columns = slice(start, min(start + _STRETCH, width))
        corner = root[columns, columns]
        eye = torch.eye(len(corner), device=root.device)
        factor = torch.linalg.solve_triangular(corner, eye, upper=True)
        earlier = change[:, :start] @ root[:start, columns]
        part = torch.addmm(values[:, columns], earlier, factor).t().contiguous()
        kept, scale = (t[:, columns].t().contiguous() for t in (keep, spread))
        found, diagonal = torch.empty_like(part), factor.diagonal()
        for j, column in enumerate(part):
            torch.mul(grid.nearest(column, scale[j]), kept[j], out=found[j])
            error = (column - found[j] * scale[j]) / diagonal[j]
            part[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
        codes[:, columns] = found.t()
        torch.sub(values[:, columns], (found * scale).t(), out=change[:, columns])
    return codes


def _better(
    first: _Rounded, second: _Rounded, weight: Tensor, matrix: Tensor, grid: Grid
) -> _Rounded:
    """Of each row the one with the smaller error; the first where they are alike."""

    def error(rounded: _Rounded) -> Tensor:
        missed = weight - _values(rounded, grid)
        return torch.linalg.vecdot(missed @ matrix, missed)

    chosen = (error(second) < error(first)).unsqueeze(1)
    pairs = zip(first, second, strict=True)
    return _Rounded(*(torch.where(chosen, there, here) for here, there in pairs))


def _descend(
    rounded: _Rounded, weight: Tensor, keep: Tensor, matrix: Tensor, grid: Grid, forth: bool
) -> _Rounded:
    """One pass of coordinate descent over the codes, at their scales."""
    width = weight.shape[1]
    codes, spread = rounded.codes.clone(), grid.spread(rounded.scales, width)
    missed = weight - codes * spread
    starts = range(0, width, _STRETCH)
    for start in starts if forth else reversed(starts):
        columns = slice(start, min(start + _STRETCH, width))
        corner = matrix[columns, columns]
        gradient = (missed @ matrix[:, columns]).t().contiguous()
        kept, scale, part = (t[:, columns].t().contiguous() for t in (keep, spread, codes))
        steps = gradient.new_tensor(1.0) / corner.diagonal()
        places = range(len(part))
        for j in places if forth else reversed(places):
            best = grid.nearest((part[j] * scale[j]).addcmul_(gradient[j], steps[j]), scale[j])
            best.mul_(kept[j])
            gradient.addr_(corner[j], (best - part[j]).mul_(scale[j]), alpha=-1)
            part[j] = best
        codes[:, columns] = part.t()
        torch.sub(weight[:, columns], (part * scale).t(), out=missed[:, columns])
    return _Rounded(codes, rounded.scales)


def _rescale(rounded: _Rounded, weight: Tensor, matrix: Tensor, grid: Grid) -> _Rounded:
    """The best scale of one group after the other, at the codes that they have."""
    width = weight.shape[1]
    scales, missed = rounded.scales.clone(), weight - _values(rounded, grid)
    size = grid.size(width)
    for group, start in enumerate(range(0, width, size)):
        columns = slice(start, min(start + size, width))
        codes = rounded.codes[:, columns]
        gain = torch.linalg.vecdot(missed @ matrix[:, columns], codes)
        curvature = torch.linalg.vecdot(codes @ matrix[columns, columns], codes)
        before = scales[:, group]
        after = _in_dtype(before + torch.where(curvature > 0, gain / curvature, 0.0), grid)
        step = after - before
        falls = (after > 0) & (step * (step * curvature - 2 * gain) < 0)  # rounded, it need not
        scales[:, group] = torch.where(falls, after, before)
        missed[:, columns] = weight[:, columns] - codes * scales[:, group, None]
    return _Rounded(rounded.codes, scales)
