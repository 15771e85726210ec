"""How much goes from which weight, so that a whole model loses exactly what was asked for.

Every function takes the weights by FQN and the share of all their elements that goes, and returns
FQN -> `SparsityConfig`, whose levels meet that share to the element; where only whole blocks go,
they stay below it by less than a block. Each entry fits `SparsityMapping.set_module_name`.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_sparsity.masks import global_masks
from fx_sparsity.masks.blocks import block_means
from fx_sparsity.patterns import Pattern, Role, SparsityConfig, Tiling
from fx_sparsity.pruning.allocation.hull import lower_hull, slope
from fx_sparsity.sparsifier.core import roles_of


@dataclass(frozen=True)
class Prunable:
    """One weight that takes part: the caller has all of this from the weight's `WeightSite`.

    Attributes:
        shape: of the weight, in storage.
        pattern: which zeros are legal; one that fixes its own level, as 2:4 does, cannot take part.
        roles: of its dimensions; [out, in, kernel...] by default.
    """

    shape: Sequence[int]
    pattern: Pattern | str
    roles: Sequence[Role] | None = None

    @property
    def elements(self) -> int:
        """Of the weight."""
        return torch.Size(self.shape).numel()

    @property
    def tiling(self) -> Tiling:
        """Its pattern in storage dimensions. Raises `PatternError` where that does not fit."""
        roles = roles_of({"roles": self.roles}, len(self.shape))
        return Pattern.parse(self.pattern).tiling(self.shape, roles)

    @property
    def steps(self) -> tuple[int, int]:
        """Between nothing and all: how many steps its level has, and the elements of each.

        Ragged blocks count as whole ones.
        """
        tiling = self.tiling
        blocks = torch.Size(tiling.grid(self.shape)).numel()
        if tiling.zeros == "level":
            return tiling.block_size, blocks
        return blocks, tiling.block_size if tiling.zeros == "all" else tiling.zeros


Levels = dict[str, SparsityConfig]


def uniform(weights: Mapping[str, Prunable], level: float) -> Levels:
    """The same share of every weight.

    Args:
        weights: by FQN.
        level: share of all their elements that goes, in [0, 1].

    Raises:
        ValueError: a pattern fixes its level, or the patterns cannot prune that much.
    """
    return _meet(weights, level, lambda shift: dict.fromkeys(weights, shift))


def erdos_renyi(weights: Mapping[str, Prunable], level: float) -> Levels:
    """Densities in proportion to sum(shape) / prod(shape): thin weights stay denser.

    Erdős–Rényi of arXiv 1707.04780 with the kernel's sizes counted as of arXiv 1911.11134. Where
    that asks for more than all of a weight, it stays dense.

    Args:
        weights: by FQN.
        level: share of all their elements that goes, in [0, 1].

    Raises:
        ValueError: as for `uniform`.
    """
    ratios = {name: sum(w.shape) / max(1, w.elements) for name, w in weights.items()}
    top = max(1 / ratio for ratio in ratios.values() if ratio) if weights else 1.0
    return _meet(
        weights, level, lambda share: {n: 1 - (1 - share) * top * r for n, r in ratios.items()}
    )


def owl(
    weights: Mapping[str, Prunable],
    level: float,
    outlier_ratios: Mapping[str, float],
    spread: float = 0.08,
) -> Levels:
    """Less from blocks with many outliers (OWL, arXiv 2310.05175, section 3.2).

    Args:
        weights: by FQN.
        level: share of all their elements that goes, in [0, 1].
        outlier_ratios: FQN -> `outlier_ratio` of the block that it lies in. Weights of one block
            get one level, since they have one ratio.
        spread: lambda: the levels' range is twice that, before they are clamped to [0, 1].

    Raises:
        ValueError: as for `uniform`.
        KeyError: a weight without an outlier ratio.
    """
    ratios = {name: outlier_ratios[name] for name in weights}
    low, high = min(ratios.values(), default=0.0), max(ratios.values(), default=0.0)
    scale = 2 * spread / (high - low) if high > low else 0.0
    reach = 1 + 2 * spread  # from where no weight is pruned to where all are
    return _meet(
        weights,
        level,
        lambda share: {n: share * reach - (r - low) * scale for n, r in ratios.items()},
    )


def outlier_ratio(scores: Sequence[Tensor], multiple: float = 5.0) -> float:
    """Share of the scores of a block above `multiple` times their mean.

    Layerwise outlier distribution, arXiv 2310.05175, section 3.2: all weights of a block are one
    pool, with one mean.

    Args:
        scores: of each of its weights, of any shapes and one floating dtype.
        multiple: M.
    """
    count = max(1, sum(part.numel() for part in scores))
    mean = sum(float(part.sum(dtype=torch.float64)) for part in scores) / count
    return sum(int((part > multiple * mean).sum()) for part in scores) / count


def by_sensitivity(
    weights: Mapping[str, Prunable],
    level: float,
    errors: Mapping[str, Mapping[float, float]],
) -> Levels:
    """The least sum of errors, from errors measured at some levels.

    Each weight's error is taken for the lower convex hull of what was measured, and of no error at
    level 0; elements go in the order of what each adds to the error, which is optimal then.

    Args:
        weights: by FQN.
        level: share of all their elements that goes, in [0, 1].
        errors: FQN -> {level: error}. No weight loses more than the highest level measured of it
            (plus a block, where levels are rounded).

    Raises:
        ValueError: as for `uniform`, or no error was measured at high enough levels.
        KeyError: a weight without errors.
    """
    hulls = {name: lower_hull({0.0: 0.0, **errors[name]}) for name in weights}
    slopes = sorted(
        (slope(a, b) / max(1, weights[name].elements), name, index)
        for name, hull in hulls.items()
        for index, (a, b) in enumerate(itertools.pairwise(hull))
    )
    left = level * sum(w.elements for w in weights.values())
    ideal = dict.fromkeys(weights, 0.0)
    for _, name, index in slopes:
        width = hulls[name][index + 1][0] - hulls[name][index][0]
        taken = min(width, left / max(1, weights[name].elements))
        ideal[name] += taken
        left -= taken * weights[name].elements
    if left > 0.5:
        raise ValueError(
            f"level {level:g} needs errors at higher levels: {round(left)} elements are beyond "
            "what was measured"
        )
    return _rounded(weights, level, ideal)


def halfway(weights: Mapping[str, Prunable], level: float, one: Levels, other: Levels) -> Levels:
    """The mean of two levels of every weight.

    Args:
        weights: by FQN.
        level: share of all their elements that goes, in [0, 1]; that of both.
        one: levels by FQN.
        other: levels by FQN.

    Raises:
        ValueError: as for `uniform`.
    """
    pairs = {name: (one[name].level or 0.0, other[name].level or 0.0) for name in weights}
    return _rounded(weights, level, {name: sum(pair) / 2 for name, pair in pairs.items()})


def global_ranking(
    weights: Mapping[str, Prunable], level: float, scores: Mapping[str, Tensor]
) -> Levels:
    """One ranking over all weights: each loses what is its part of the lowest scores.

    Args:
        weights: by FQN, with blocks of one size.
        level: share of all their elements that goes, in [0, 1].
        scores: FQN -> scores of the weight's shape; a block counts by their mean.

    Raises:
        ValueError: as for `uniform`, or patterns that rank within rows, or blocks of several sizes.
        KeyError: a weight without scores.
    """
    tilings = {name: weight.tiling for name, weight in weights.items()}
    sizes = {weights[name].steps[1] for name in weights}
    if len(sizes) > 1 or any(tiling.zeros == "level" for tiling in tilings.values()):
        raise ValueError(
            "one ranking over all weights needs blocks of one size, that may all go from one "
            f"weight; found {', '.join(sorted({str(w.pattern) for w in weights.values()}))}"
        )
    means = []
    for name, tiling in tilings.items():
        score = scores[name]
        if tiling.block_size > 1:
            ends = zip(tiling.grid(score.shape), tiling.extents, strict=True)
            whole = score[tuple(slice(n * e) for n, e in ends)]
            score = block_means(whole, tiling.extents, lambda x: x.double())
        means.append(score.reshape(-1))
    blocks = sum(len(mean) for mean in means)
    goal = _goal(weights, level) // max([1, *sizes])
    masks = global_masks(means, goal / blocks) if blocks else [mean > 0 for mean in means]
    shares = [float((~mask).double().mean()) if len(mask) else 0.0 for mask in masks]
    return _rounded(weights, level, dict(zip(weights, shares, strict=True)))


def _goal(weights: Mapping[str, Prunable], level: float) -> int:
    """How many elements go.

    Raises:
        ValueError: the patterns do not leave the choice, or cannot prune that much.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"a sparsity level lies in [0, 1], found {level!r}")
    for name, weight in weights.items():
        if Pattern.parse(weight.pattern).implied_level is not None:
            raise ValueError(
                f"{name}: pattern {weight.pattern} fixes its level, so none can be allocated to "
                "it; leave it out"
            )
    goal = round(level * sum(weight.elements for weight in weights.values()))
    most = sum(math.prod(weight.steps) for weight in weights.values())
    if goal > most:
        raise ValueError(
            f"level {level:g} asks for {goal} zeros, the patterns allow {most}; lower it, or "
            "choose patterns that prune edges too"
        )
    return goal


def _meet(
    weights: Mapping[str, Prunable], level: float, levels_at: Callable[[float], Mapping[str, float]]
) -> Levels:
    """The levels of a family that prune as much as `level` asks for.

    Args:
        weights: by FQN.
        level: share of all their elements that goes.
        levels_at: a number in [0, 1] to levels that rise with it, from none to all of each weight;
            they are clamped to [0, 1].
    """
    goal = _goal(weights, level)
    sizes = {name: math.prod(weight.steps) for name, weight in weights.items()}

    def clamped(at: float) -> dict[str, float]:
        return {name: min(max(share, 0.0), 1.0) for name, share in levels_at(at).items()}

    low, high = 0.0, 1.0
    for _ in range(64):  # as often as a float64 can be halved
        middle = (low + high) / 2
        zeros = sum(share * sizes[name] for name, share in clamped(middle).items())
        low, high = (middle, high) if zeros < goal else (low, middle)
    return _rounded(weights, level, clamped(high))


def _rounded(weights: Mapping[str, Prunable], level: float, ideal: Mapping[str, float]) -> Levels:
    """Whole steps that come to the goal: rounded down, then one more where most was cut off."""
    steps = {name: weight.steps for name, weight in weights.items()}
    exact = {name: ideal[name] * steps[name][0] for name in weights}
    counts = {name: min(steps[name][0], math.floor(exact[name] + 1e-9)) for name in weights}
    left = _goal(weights, level) - sum(counts[name] * steps[name][1] for name in weights)
    for name in sorted(weights, key=lambda name: counts[name] - exact[name]):
        if left >= steps[name][1] and counts[name] < steps[name][0]:
            counts[name] += 1
            left -= steps[name][1]
    for name in sorted(weights, key=lambda name: -steps[name][1]):  # what larger blocks left over
        most, size = steps[name]
        more = max(-counts[name], min(most - counts[name], left // size)) if size else 0
        counts[name] += more
        left -= more * size
    return {
        name: SparsityConfig(weight.pattern, counts[name] / max(1, steps[name][0]))
        for name, weight in weights.items()
    }
