"""The published algorithms in float64, from their definitions and not from their shortcuts."""

import itertools

import torch

from tests.masks.reference import reference_mask


def damped(gram, damping=0.01):
    """H, [in, in]; an input that is always zero is damped by far less."""
    gram = gram.double()
    diagonal = gram.diagonal()
    shares = torch.where(diagonal == 0, 1e-9, damping)
    return gram + torch.diag(shares * diagonal.mean())


def sparsegpt(weight, gram, tiling, level, stretch, share=None, damping=0.01):
    """Optimal brain surgery column by column, with the inverse of what remains of H each time.

    `share(start, stop, blocks)` says how many of a stretch's blocks go.
    """
    h, w = damped(gram, damping), weight.double().clone()
    width = w.shape[1]
    group = tiling.extents[1] if tiling.zeros == "level" and tiling.extents[1] < width else None
    remaining = [torch.linalg.inv(h[j:, j:]) for j in range(width)]
    keep = torch.ones(w.shape, dtype=torch.bool)
    for j in range(width):
        span = group or stretch
        if j % span == 0:
            end = min(j + span, width)
            costs = w[:, j:end] ** 2 / torch.tensor([remaining[i][0, 0] for i in range(j, end)])
            if group:
                part, part_level = tiling, level
            else:
                blocks = torch.Size(tiling.grid(costs.shape)).numel()
                part, part_level = tiling, share(j, end) / max(blocks, 1)
            keep[:, j:end] = reference_mask(costs.numpy(), part, part_level)
        inverse = remaining[j]
        e = torch.where(keep[:, j], 0.0, w[:, j] / inverse[0, 0])
        w[:, j:] -= e[:, None] * inverse[0]
        w[:, j] = torch.where(keep[:, j], w[:, j], 0.0)
    return keep, w


def least_squares(weight, gram, keep, damping=0.01):
    """Row by row, the kept weights that are best: H_KK v = (H w)_K."""
    h, w = damped(gram, damping), weight.double()
    v = torch.zeros_like(w)
    for row, kept in enumerate(keep):
        v[row, kept] = torch.linalg.solve(h[kept][:, kept], (h @ w[row])[kept])
    return v


def swap(difference, values, keep, h, cells):
    """The best exchange of one kept for one pruned weight of a cell, by trying every one of them.

    `difference` is W - V of one row. Returns what it lowers the error by, and the two columns.
    """
    best = (0.0, None, None)
    for cell in cells:
        for gone, back in itertools.product(cell, cell):
            if keep[gone] and not keep[back]:
                d = difference.clone()
                d[gone] += values[gone]
                before = difference @ h @ difference
                step = (h[back] @ d) / h[back, back]
                d[back] -= step
                gain = float(before - d @ h @ d)
                if gain > best[0]:
                    best = (gain, gone, back)
    return best
