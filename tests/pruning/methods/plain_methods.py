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


def best_exchange(row, values, keep, h, cell):
    """The exchange of a kept for a pruned weight of one cell that lowers a row's error most.

    Every pair is tried, the one that comes back at its best value; by less than 1e-5 of what its
    return is worth none is made. Gives the new values and mask, or None.
    """
    error = (row - values) @ h @ (row - values)
    best = (1e-12 * float(error), None)
    for gone, back in itertools.product(cell, cell):
        if keep[gone] and not keep[back]:
            new, kept = values.clone(), keep.clone()
            new[gone] = 0
            kept[gone], kept[back] = False, True
            without = float((row - new) @ h @ (row - new))
            new[back] = (h[back] @ (row - new)) / h[back, back]
            after = float((row - new) @ h @ (row - new))
            if error - after > max(best[0], 1e-5 * (without - after)):
                best = (float(error) - after, (new, kept))
    return best[1]


def swaps(weight, values, keep, gram, cell, stretch, sweeps):
    """Row by row: stretches from right to left and back, in them cells from left to right.

    In narrow cells the best exchange of all; in wide ones, for as long as there are any, that of
    the pruned weight whose return alone would lower the error most. Then kept weights one by one.
    """
    h, weight = damped(gram), weight.double()
    values, keep = values.double().clone(), keep.clone()
    width = weight.shape[1]
    stretches = [range(s, min(s + stretch, width), cell) for s in range(0, width, stretch)]
    turns = [stretches[::-1] if sweep % 2 == 0 else stretches for sweep in range(sweeps)]
    for r, row in enumerate(weight):
        for start in itertools.chain(*itertools.chain(*turns)):
            place = range(start, min(start + cell, width))
            candidates = list(place)
            while True:
                if len(place) > 32:
                    pruned = [j for j in place if not keep[r, j]]
                    gain = {j: (h[j] @ (row - values[r])) ** 2 / h[j, j] for j in pruned}
                    best = max(pruned, key=gain.__getitem__, default=None)
                    candidates = [j for j in place if keep[r, j] or j == best]
                new = best_exchange(row, values[r], keep[r], h, candidates)
                if new:
                    values[r], keep[r] = new
                if not new or len(place) <= 32:
                    break
            for j in place:
                if keep[r, j]:
                    values[r, j] += h[j] @ (row - values[r]) / h[j, j]
    return keep, values


def admm(weight, gram, tiling, level, iterations, damping=0.01):
    """Alternating directions on inputs of unit size, with the schedule of ALPS."""
    h = damped(gram, damping)
    size = h.diagonal().sqrt()
    h = h / size[:, None] / size
    w = weight.double() * size
    d, y, rho = w.clone(), torch.zeros_like(w), 0.1
    last = torch.ones(w.shape, dtype=torch.bool)
    for t in range(iterations):
        v = torch.linalg.solve(h + rho * torch.eye(len(h)), (w @ h + rho * d - y).T).T
        keep = reference_mask((v + y / rho).square().numpy(), tiling, level)
        d = (v + y / rho) * keep
        y = y + rho * (v - d)
        if t % 3 == 2:
            moved, zeros = int((keep ^ last).sum()), int((~keep).sum())
            if not moved:
                break
            rho *= 1.3 if moved >= 0.1 * zeros else 1.2 if moved >= 0.005 * zeros else 1.1
            last = keep
    return keep, d / size


def rounding(weight, values, keep, gram, bits, group, passes, damping=0.01):
    """Scales, GPTQ with the mask held, the better of it and rounding to nearest, and descent.

    Everything in loops over rows, columns and groups, with the inverse of H. Gives codes and scales.
    """
    h, most = damped(gram, damping), 2 ** (bits - 1)
    w, v = weight.double(), values.double()
    width = w.shape[1]
    group = group or width
    groups = [slice(i, min(i + group, width)) for i in range(0, width, group)]
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).mT

    def code(value, scale):
        return torch.clamp(torch.round(value / scale), -most, most - 1)

    def value_of(codes, scales):
        return torch.cat([codes[g] * s for g, s in zip(groups, scales, strict=True)])

    def error(row, codes, scales):
        missed = row - value_of(codes, scales)
        return float(missed @ h @ missed)

    def swept(row, kept, scales):
        row, codes = row.clone(), torch.zeros(width, dtype=torch.float64)
        for j in range(width):
            scale = scales[j // group]
            codes[j] = code(row[j], scale) if kept[j] else 0.0
            row[j + 1 :] -= (row[j] - codes[j] * scale) / upper[j, j] * upper[j, j + 1 :]
        return codes

    all_codes, all_scales = [], []
    for row, start, kept in zip(w, v, keep, strict=True):
        plain, chosen = [], []
        for g in groups:
            largest = float(start[g].abs().max()) / (most - 0.5) or 1.0
            costs = {
                largest * (1 - i / 20): float(
                    ((start[g] - code(start[g], s) * s) ** 2 * h.diagonal()[g]).sum()
                )
                for i in range(11)
                if (s := largest * (1 - i / 20))
            }
            plain.append(largest)
            chosen.append(min(costs, key=costs.__getitem__))
        nearest = [
            torch.cat([code(start[g], s) for g, s in zip(groups, scales, strict=True)])
            for scales in (chosen, plain)
        ]
        candidates = [
            (swept(start, kept, chosen), chosen),
            (nearest[0], chosen),
            (nearest[1], plain),
        ]
        codes, scales = min(candidates, key=lambda pair: error(row, *pair))
        codes, scales = codes.clone(), list(scales)
        for turn in range(passes):
            for j in range(width) if turn % 2 else reversed(range(width)):
                if kept[j]:
                    scale, found = scales[j // group], value_of(codes, scales)
                    codes[j] = code(found[j] + (row - found) @ h[:, j] / h[j, j], scale)
            for i, g in enumerate(groups):
                curvature = float(codes[g] @ h[g, g] @ codes[g])
                gain = float((row - value_of(codes, scales)) @ h[:, g] @ codes[g])
                moved = scales[i] + (gain / curvature if curvature > 0 else 0.0)
                scales[i] = moved if moved > 0 else scales[i]
        all_codes.append(codes)
        all_scales.append(torch.tensor(scales, dtype=torch.float64))
    return torch.stack(all_codes), torch.stack(all_scales)


def relaxed_admm(weight, gram, tiling, level, iterations, relaxation, damping=0.01):
    """Its mask with a penalty that stays, over-relaxed, from what ranking w^2 H_jj keeps."""
    h = damped(gram, damping)
    size = h.diagonal().sqrt()
    h, w = h / size[:, None] / size, weight.double() * size
    rho = 0.3 + 0.5 * float(torch.linalg.eigvalsh(h[::2, ::2]).log().mean().exp())
    keep = reference_mask(w.square().numpy(), tiling, level)
    d, u = w * keep, 2 * w * ~keep
    for _ in range(iterations):
        v = torch.linalg.solve(h + rho * torch.eye(len(h)), (w @ h + rho * (d - u)).T).T
        v = relaxation * v + (1 - relaxation) * d
        keep = reference_mask((v + u).square().numpy(), tiling, level)
        u, d = (v + u) * ~keep, (v + u) * keep
    return keep
