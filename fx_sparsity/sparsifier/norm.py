"""Magnitude pruning: what has the smallest norm goes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.masks import ScoreError, compute_mask
from fx_sparsity.patterns import Pattern, PatternError, StorageBlock
from fx_sparsity.sparsifier.base import BaseSparsifier
from fx_sparsity.sparsifier.core import SparsifierCore, roles_of
from fx_sparsity.sparsifier.data import BaseDataSparsifier, Data

Norm = Callable[[Tensor], Tensor] | str | int | None


def norm_scores(weight: Tensor, norm: Norm) -> Tensor:
    """Importance of every element by its own size, in float32 (float64 for float64 weights).

    Args:
        weight: any shape, floating.
        norm: `"L1"` or 1 for |w|; `"L2"`, 2 or None for w²; or a function tensor -> scores.

    Raises:
        ValueError: another norm.
    """
    if callable(norm):
        return norm(weight)
    weight = weight.float() if weight.dtype.itemsize < 4 else weight
    if norm in ("L1", 1):
        return weight.abs()
    if norm in ("L2", 2, None):
        return weight.square()
    raise ValueError(f'norm must be "L1", "L2", 1, 2 or a function, found {norm!r}')


class _NormMixin(SparsifierCore):
    """What the two norm sparsifiers share: they differ in what they hold, not in what they do."""

    norm: Norm

    def _init_norm(self, norm: Norm) -> None:
        norm_scores(torch.zeros(1), norm)  # an unknown norm is an error here, not at the first step
        self.norm = norm

    def pattern_of(self, config: Mapping[str, Any]) -> tuple[Pattern, float]:
        """See `SparsifierCore.pattern_of`. Levels outside [0, 1] are clamped, as they always were.

        `pattern` wins over `sparse_block_shape` and `zeros_per_block`, which speak of storage.
        """
        pattern = config.get("pattern")
        if pattern is None:
            pattern = StorageBlock(tuple(config["sparse_block_shape"]), config["zeros_per_block"])
        return Pattern.parse(pattern), min(max(config["sparsity_level"], 0.0), 1.0)

    def check_config(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> None:
        """See `SparsifierCore.check_config`."""
        try:
            pattern, _ = self.pattern_of(config)
            pattern.tiling(tensor.shape, roles_of(config, tensor.ndim))
        except PatternError as error:
            raise PatternError(f"{name}: {error}") from error

    def check_update(self, name: str) -> None:
        """Refuse NaN, which has no rank."""
        if bool(torch.isnan(self._target(name).original).any()):
            raise ScoreError(f"{name} contains NaN; its mask cannot be computed")

    def _norm_mask(self, name: str, config: Mapping[str, Any]) -> None:
        target = self._target(name)
        weight = target.original
        pattern, level = self.pattern_of(config)
        tiling = pattern.tiling(weight.shape, roles_of(config, weight.ndim))
        # Squares rank single elements as magnitudes do, and magnitudes do not underflow.
        single = tiling.block_size == 1 and self.norm in ("L2", 2, None)
        scores = norm_scores(weight, "L1" if single else self.norm)
        try:
            target.mask.update(compute_mask(scores, tiling, level))
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
        super().__init__(
            {
                "sparsity_level": sparsity_level,
                "sparse_block_shape": sparse_block_shape,
                "zeros_per_block": zeros_per_block,
            }
        )

    def update_mask(self, module: nn.Module, tensor_name: str, **config: Any) -> None:
        """See `BaseSparsifier.update_mask`."""
        self._norm_mask(config["tensor_fqn"], config)


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
        super().__init__(
            data_list,
            sparsity_level=sparsity_level,
            sparse_block_shape=sparse_block_shape,
            zeros_per_block=zeros_per_block,
        )

    def update_mask(self, name: str, data: Tensor, **config: Any) -> None:
        """See `BaseDataSparsifier.update_mask`."""
        self._norm_mask(name, config)
