"""Magnitude pruning: what has the smallest norm goes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

from torch import Tensor, nn

from fx_sparsity.masks import Rank, ScoreError, compute_mask, contains_nan, native
from fx_sparsity.masks.rank import NAN
from fx_sparsity.patterns import Pattern, PatternError, StorageBlock
from fx_sparsity.sparsifier.base import BaseSparsifier
from fx_sparsity.sparsifier.core import SparsifierCore, roles_of
from fx_sparsity.sparsifier.data import BaseDataSparsifier, Data

Norm = Callable[[Tensor], Tensor] | str | int | None


_RANKS: dict[Norm, Rank] = {
    "L1": Rank.MAGNITUDE,
    1: Rank.MAGNITUDE,
    "L2": Rank.SQUARE,
    2: Rank.SQUARE,
    None: Rank.SQUARE,
}


_KEYS = frozenset(
    {
        *("sparsity_level", "sparse_block_shape", "zeros_per_block", "pattern", "roles"),
        "lost_zeros",
        *("tensor_fqn", "module_fqn", "module", "tensor_name"),
    }
)
"""What a configuration of a norm sparsifier may hold."""


class _NormMixin(SparsifierCore):
    """What the two norm sparsifiers share: they differ in what they hold, not in what they do."""

    norm: Norm

    def _init_norm(self, norm: Norm) -> None:
        if not callable(norm) and norm not in _RANKS:
            raise ValueError(f'norm must be "L1", "L2", 1, 2 or a function, found {norm!r}')
        self.norm = norm

    def pattern_of(self, config: Mapping[str, Any]) -> tuple[Pattern, float]:
        """See `SparsifierCore.pattern_of`. Levels outside [0, 1] are clamped, as they always were.

        `pattern` wins over `sparse_block_shape` and `zeros_per_block`, which speak of storage; one
        that fixes its level, as 2:4 does, wins over `sparsity_level`.
        """
        if config.get("pattern") is None:
            block, zeros = config["sparse_block_shape"], config["zeros_per_block"]
            shape = (int(block[0]), int(block[1]))
            pattern: Pattern = StorageBlock(shape, None if zeros == math.prod(shape) else zeros)
        else:
            pattern = Pattern.parse(config["pattern"])
        level = pattern.implied_level
        return pattern, min(max(config["sparsity_level"], 0.0), 1.0) if level is None else level

    def ranked(self, weight: Tensor) -> tuple[Tensor, Rank]:
        """What this sparsifier ranks of a weight, and how: scores by value, or itself by a norm."""
        if callable(self.norm):
            return self.norm(weight), Rank.VALUE
        return weight, _RANKS[self.norm]

    def check_config(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> None:
        """See `SparsifierCore.check_config`. A key that no method reads is refused by name."""
        for key in config:
            if key not in _KEYS:
                near = get_close_matches(key, _KEYS) or sorted(_KEYS)
                raise TypeError(
                    f"{name}: unknown key {key!r} in its configuration; "
                    f"known are {', '.join(map(repr, near))}"
                )
        level = config["sparsity_level"]
        if not isinstance(level, Real):
            raise TypeError(f"{name}: expected a number as sparsity_level, found {level!r}")
        try:
            pattern, _ = self.pattern_of(config)
            pattern.tiling(tensor.shape, roles_of(config, tensor.ndim))
        except PatternError as error:
            raise PatternError(f"{name}: {error}") from error

    def check_updates(self, names: Sequence[str]) -> None:
        """Refuse NaN, which has no rank. The C++ operators notice it when they rank."""
        weights = {name: self._target(name).original for name in names}
        if callable(self.norm):
            weights = {name: self.norm(weight) for name, weight in weights.items()}
        left = {name: weight for name, weight in weights.items() if not native.covers(weight)}
        if contains_nan(*left.values()):
            bad = next(name for name, weight in left.items() if contains_nan(weight))
            raise ScoreError(f"{bad}: {NAN}")

    def _arguments(self, name: str) -> dict[str, Any]:
        """With a number of zeros, as subclasses that were written for `torch.ao.pruning` expect."""
        config = self.config_of(name)
        if config["zeros_per_block"] is not None:
            return config
        return {**config, "zeros_per_block": math.prod(config["sparse_block_shape"])}

    def _norm_mask(self, name: str, weight: Tensor, config: Mapping[str, Any]) -> None:
        target = self._target(name)
        pattern, level = self.pattern_of(config)
        tiling = pattern.tiling(weight.shape, roles_of(config, weight.ndim))
        try:
            scores, rank = self.ranked(weight)
            checked = scores is target.original and not native.covers(scores)
            compute_mask(scores, tiling, level, rank, out=target.mask.mask, checked=checked)
        except ScoreError as error:
            raise ScoreError(f"{name}: {error}") from error


class WeightNormSparsifier(_NormMixin, BaseSparsifier):
    """Prunes the blocks of a model's weights whose norm is smallest.

    Args:
        sparsity_level: share of blocks to prune; below 0 and above 1 is clamped.
        sparse_block_shape: rows x columns of a block, in the last two storage dimensions.
        zeros_per_block: zeros in every pruned block; all of it by default.
        norm: `"L1"`, `"L2"` (default), 1, 2, or a function tensor -> scores of that shape.

    A config entry may instead give `pattern` (see `Pattern.parse`), with `roles` of the axes.
    """

    def __init__(
        self,
        sparsity_level: float = 0.5,
        sparse_block_shape: tuple[int, int] = (1, 4),
        zeros_per_block: int | None = None,
        norm: Norm = None,
    ) -> None:
        self._init_norm(norm)
        StorageBlock(sparse_block_shape, zeros_per_block)
        super().__init__(_blocks(sparsity_level, sparse_block_shape, zeros_per_block))

    def update_mask(  # type: ignore[override]
        self,
        module: nn.Module,
        tensor_name: str,
        sparsity_level: float,
        sparse_block_shape: tuple[int, int],
        zeros_per_block: int,
        **config: Any,
    ) -> None:
        """See `BaseSparsifier.update_mask`."""
        name = self.name_of(module, tensor_name)
        config |= _blocks(sparsity_level, sparse_block_shape, zeros_per_block)
        self._norm_mask(name, self.get_tensor(name), config)


class DataNormSparsifier(_NormMixin, BaseDataSparsifier):
    """Prunes the blocks of named tensors whose norm is smallest.

    Args:
        data_list: (name, data) pairs, see `BaseDataSparsifier.add_data`.
        sparsity_level: share of blocks to prune; below 0 and above 1 is clamped.
        sparse_block_shape: rows x columns of a block; one-dimensional data is a single row.
        zeros_per_block: zeros in every pruned block; all of it by default.
        norm: `"L1"` (default), `"L2"`, 1, 2, or a function tensor -> scores of that shape.
    """

    def __init__(
        self,
        data_list: Iterable[tuple[str, Data]] | None = None,
        sparsity_level: float = 0.5,
        sparse_block_shape: tuple[int, int] = (1, 4),
        zeros_per_block: int | None = None,
        norm: Norm = "L1",
    ) -> None:
        self._init_norm(norm)
        StorageBlock(sparse_block_shape, zeros_per_block)
        blocks = _blocks(sparsity_level, sparse_block_shape, zeros_per_block)
        super().__init__(data_list, **blocks)

    def update_mask(  # type: ignore[override]
        self,
        name: str,
        data: Tensor,
        sparsity_level: float,
        sparse_block_shape: tuple[int, int],
        zeros_per_block: int,
        **config: Any,
    ) -> None:
        """See `BaseDataSparsifier.update_mask`."""
        config |= _blocks(sparsity_level, sparse_block_shape, zeros_per_block)
        self._norm_mask(name, data, config)


def _blocks(level: float, shape: tuple[int, int], zeros: int | None) -> dict[str, Any]:
    """What both have by default, and spell out as arguments of `update_mask`."""
    return {"sparsity_level": level, "sparse_block_shape": shape, "zeros_per_block": zeros}
