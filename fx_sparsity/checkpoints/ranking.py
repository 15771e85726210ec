"""What decides on the zeros of a checkpoint's weights, by their values alone."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.checkpoints.checkpoint import Checkpoint, CheckpointError
from fx_sparsity.graph import WeightMap
from fx_sparsity.graph.mapping import Assignment
from fx_sparsity.masks import GlobalCut, Rank, global_cut
from fx_sparsity.patterns import SparsityConfig, Unstructured
from fx_sparsity.sparsifier import BaseDataSparsifier, DataNormSparsifier
from fx_sparsity.storage.container import elements_of


class Criterion:
    """Which weights of a checkpoint are masked, and the mask of each."""

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
        config = self.assignment[name]
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
            yield self._ranked(self._source.read(name))[0]

    def _ranked(self, tensor: Tensor) -> tuple[Tensor, Rank]:
        assert isinstance(self._sparsifier, DataNormSparsifier)
        return self._sparsifier.ranked(tensor)


class _Reread:
    """Makes a new iterator whenever it is gone through."""

    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Tensor]:
        return self._make()
