"""Small calibrated methods, for tests alone."""

import torch

from fx_sparsity.masks import compute_mask
from fx_sparsity.pruning.methods import CalibratedSparsifier, Solution


class Method(CalibratedSparsifier):
    """Half of everything, by default."""

    def __init__(self, pattern="unstructured", level=0.5):
        super().__init__({"pattern": pattern, "sparsity_level": level})


class Magnitude(Method):
    def solve(self, weight, stats, tiling, level):
        return Solution(compute_mask(weight.abs(), tiling, level), weight)


class TinyWanda(Method):
    needs = frozenset({"input_norm"})

    def solve(self, weight, stats, tiling, level):
        scores = weight.abs() * stats.squares.sqrt().unsqueeze(1)
        return Solution(compute_mask(scores, tiling, level), weight)


class LeastSquares(Method):
    """Magnitude masks, and for what is kept of every row the least squares solution."""

    needs = frozenset({"gram"})

    def solve(self, weight, stats, tiling, level):
        mask = compute_mask(weight.abs(), tiling, level)
        result = weight.clone()
        for group, row in [(g, o) for g in range(len(weight)) for o in range(weight.shape[1])]:
            if stats.gram is None:
                continue
            keep, gram = mask[group, row], stats.gram[group].double()
            target = gram[keep] @ weight[group, row].double()
            solved = torch.linalg.lstsq(gram[keep][:, keep], target.unsqueeze(1), driver="gelsd")
            result[group, row, keep] = solved.solution.squeeze(1).float()
        return Solution(mask, result)


class Everything(Method):
    """Keeps what it is shown: statistics in matrix form, by the order of the weights."""

    needs = frozenset({"input_norm", "input_mean", "gram"})

    def __init__(self, pattern="unstructured", level=0.0):
        super().__init__(pattern, level)
        self.shown = []

    def solve(self, weight, stats, tiling, level):
        self.shown.append((weight, stats, tiling))
        return Solution(compute_mask(weight.abs(), tiling, level), weight)


class Recording:
    """A method that keeps what it is shown, in the order of the graph."""

    needs = frozenset({"input_norm", "gram"})

    def __init__(self, *args):
        super().__init__(*args)
        self.grams = []

    def solve(self, weight, stats, tiling, level):
        self.grams.append(None if stats.gram is None else stats.gram.clone())
        return super().solve(weight, stats, tiling, level)


class Recorded(Recording, TinyWanda):
    pass


class RecordedSquares(Recording, LeastSquares):
    pass
