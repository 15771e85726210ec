"""What decides on the zeros of a checkpoint's weights, by their values alone."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.checkpoints.names import scale_of
from fx_sparsity.graph import WeightMap
from fx_sparsity.graph.mapping import Assignment
from fx_sparsity.masks import GlobalCut, Rank, global_cut
from fx_sparsity.patterns import SparsityConfig, Unstructured
from fx_sparsity.sparsifier import BaseDataSparsifier, DataNormSparsifier
from fx_sparsity.storage.container import elements_of, is_integers
from fx_sparsity.storage.json_files import object_in

_BLOCK = 128  # elements along an axis that share a scale, unless a configuration says otherwise


class Criterion:
    """Which weights of a checkpoint are masked, and the mask of each.

    Codes of fp8 rank by the values that they stand for: times their scale.

    Raises:
        CheckpointError: an unknown `ranked`, patterns that it does not take, or a weight whose
            scale cannot be made out.
    """

    def __init__(
        self,
        source: Checkpoint,
        weights: WeightMap,
        assignment: Assignment,
        sparsifier: BaseDataSparsifier,
        ranked: str,
    ) -> None:
        self.weights, self.assignment, self.ranked = weights, assignment, ranked
        self._source, self._sparsifier = source, sparsifier
        self._cut: GlobalCut | None = None
        self._scales = {fqn: scale for fqn in assignment if (scale := self._scale_of(fqn))}
        self._places = {name: place for place, name in enumerate(assignment)}
        if ranked not in ("weight", "model"):
            raise CheckpointError(f'ranked: expected "weight" or "model", found {ranked!r}')
        if ranked == "model":
            self._check_one_level()

    def describe(self) -> dict[str, Any]:
        """Everything that decides on the masks, for JSON."""
        sparsifier = self._sparsifier
        settings = {
            key: getattr(value, "__qualname__", None) or repr(value)
            for key, value in vars(sparsifier).items()
            if not key.startswith("_") and key not in ("state", "data_groups", "steps")
        }
        return {
            "sparsifier": {"class": type(sparsifier).__qualname__, **settings},
            "ranked": self.ranked,
            "weights": {fqn: str(config) for fqn, config in self.assignment.items()},
            "roles": {site.fqn: site.roles for site in self.weights.sites},
        }

    def prepare(self, known: Any) -> Any:
        """Read the checkpoint once, where one level is for all of it; `known` is of a former run.

        Returns:
            What a later run has to know, for JSON; None where nothing.
        """
        if self.ranked != "model" or not self.assignment:
            return None
        if known is None:
            _, rank = self._ranked(torch.zeros(1))
            level = next(iter(self.assignment.values())).level
            self._cut = global_cut(_Reread(self._scores), level, rank)
            return asdict(self._cut)
        self._cut = GlobalCut(
            known["key"], known["bits"], Rank(known["rank"]), tuple(known["ties"])
        )
        return known

    def mask(self, name: str, tensor: Tensor) -> Tensor:
        """True is kept."""
        config, tensor = self.assignment[name], self._values(name, tensor)
        if self._cut is not None:
            return self._cut.mask(self._places[name], self._ranked(tensor)[0])
        roles = self.weights[name].roles
        own = {"pattern": str(config.pattern), "sparsity_level": config.level, "roles": roles}
        return self._sparsifier.mask_for(name, tensor, **own)

    def reached(self, name: str, masked: int) -> SparsityConfig:
        """The pattern that a weight's mask has: as asked, but where one level is for all weights.

        Args:
            name: of the weight.
            masked: how many of its elements are.
        """
        if self.ranked != "model":
            return self.assignment[name]
        return SparsityConfig(Unstructured(), masked / elements_of(self.weights[name].shape))

    def _scale_of(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """The tensor that scales a weight in codes, and how many elements share a scale."""
        shape = self.weights[name].shape
        if not self.weights[name].dtype.startswith("float8") or not elements_of(shape):
            return None
        scale = scale_of(name, self._source.where)
        if scale is None:
            return None
        dtype, scales = self._source.files[self._source.where[scale]].dtype_and_shape(scale)
        block = _block(shape, scales, self._source.config) if dtype.is_floating_point else None
        if block is None:
            raise CheckpointError(
                f"{name}: codes rank by their values only with their scale, and {scale}, of "
                f"{str(dtype)[6:]} {scales}, does not fit their shape {shape}; leave it dense"
            )
        return scale, block

    def _values(self, name: str, tensor: Tensor) -> Tensor:
        """What a tensor stands for."""
        if name not in self._scales:
            return tensor
        scale, block = self._scales[name]
        factors = (
            self._source.read(scale)
            .float()
            .reshape([-(-n // b) for n, b in zip(tensor.shape, block, strict=True)])
        )
        values = tensor.float()
        for axis, (size, shared) in enumerate(zip(values.shape, block, strict=True)):
            factors = factors.repeat_interleave(shared, axis).narrow(axis, 0, size)
        return values.mul_(factors)

    def _check_one_level(self) -> None:
        if not isinstance(self._sparsifier, DataNormSparsifier):
            found = type(self._sparsifier).__name__
            raise CheckpointError(f'ranked="model" needs a DataNormSparsifier, found {found}')
        configs = list(self.assignment.items())
        for fqn, config in configs:
            if config != SparsityConfig(Unstructured(), configs[0][1].level):
                raise CheckpointError(
                    f'{fqn}: ranked="model" needs one level of "unstructured", found {config}'
                )

    def _scores(self) -> Iterator[Tensor]:
        for name in self.assignment:
            yield self._ranked(self._values(name, self._source.read(name)))[0]

    def _ranked(self, tensor: Tensor) -> tuple[Tensor, Rank]:
        assert isinstance(self._sparsifier, DataNormSparsifier)
        return self._sparsifier.ranked(tensor)


class _Reread:
    """Makes a new iterator whenever it is gone through."""

    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Tensor]:
        return self._make()


def _block(
    shape: Sequence[int], scales: Sequence[int], config: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """How many elements along each axis share a scale; None where the shapes do not fit.

    Args:
        shape: of the weight.
        scales: shape of its scales.
        config: the model's, which may say it: blocks need not divide the weight.
    """
    if math.prod(scales) == 1:
        return tuple(shape)
    if len(scales) == 1:
        scales = (*scales, *[1] * (len(shape) - 1))
    if len(scales) != len(shape):
        return None
    stated = object_in(config, "quantization_config").get("weight_block_size")
    said: list[int] = stated if is_integers(stated) else []
    said = [*[1] * (len(shape) - len(said)), *said]
    found = []
    for size, count, stated in zip(shape, scales, said, strict=False):
        shared = [size // count] if count and size % count == 0 else []
        fitting = [n for n in (stated, _BLOCK, *shared) if n > 0 and -(-size // n) == count]
        if not fitting:
            return None
        found.append(fitting[0])
    return tuple(found)
