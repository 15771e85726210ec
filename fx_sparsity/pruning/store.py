"""Where pruned weights go: beneath masks in the model."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from fx_sparsity.graph.prepare import mask_one_by_one
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.pruning.methods import CalibratedSparsifier
from fx_sparsity.pruning.methods.where import select
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.report import PrunedWeight

DONE = "calibrated"
"""Counter in a sparsifier's state of a weight that has been pruned."""


class Store(Protocol):
    """Holds what has been done, and writes what is.

    Attributes:
        how_to_resume: after an interruption, for whoever reads of it.
    """

    how_to_resume: str

    def is_done(self, plan: Plan) -> bool:
        """Whether a weight has been pruned before."""

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """Called when everything is checked, and before anything is changed.

        Args:
            weights: of the model.
            plans: FQN -> plan of every weight that is to be pruned.
            tensors: FQN -> the model's tensor of each, not masked.
        """

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as the walk is to see it."""

    def write(
        self, row: PrunedWeight, keep: Tensor, value: Tensor, bias: tuple[Tensor, Tensor] | None
    ) -> None:
        """Write mask, weight and bias; after an interruption, none of them.

        Args:
            row: tells of the weight.
            keep: its mask: boolean, of its shape.
            value: its kept values and zeros, of its shape and dtype.
            bias: a bias, and what it has to become.
        """


class Untouched:
    """Reads as another store does, and writes nothing.

    Args:
        store: to read from.
    """

    how_to_resume = "Nothing was changed."

    def __init__(self, store: Store) -> None:
        self._store = store

    def is_done(self, plan: Plan) -> bool:
        """See `Store.is_done`."""
        return self._store.is_done(plan)

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """See `Store.begin`."""

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`."""
        return self._store.read(fqn, tensor)

    def write(
        self, row: PrunedWeight, keep: Tensor, value: Tensor, bias: tuple[Tensor, Tensor] | None
    ) -> None:
        """See `Store.write`."""


class MaskStore:
    """Puts masks on a model, and writes kept values beneath them.

    Args:
        model: whose weights are pruned.
        sparsifier: holds the masks.
    """

    how_to_resume = "Call prune again with the same sparsifier to go on."

    def __init__(self, model: nn.Module, sparsifier: CalibratedSparsifier) -> None:
        self._model, self._sparsifier = model, sparsifier
        self._weights: WeightMap
        self._plans: Mapping[str, Plan] = {}
        self._tensors: Mapping[str, Tensor] = {}
        self._put_mask: Callable[[str], object] | None = None
        self._written: dict[str, Tensor] = {}

    def is_done(self, plan: Plan) -> bool:
        """See `Store.is_done`."""
        return plan.fqn in self._sparsifier.names and DONE in self._sparsifier.state[plan.fqn]

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """See `Store.begin`."""
        self._weights, self._plans, self._tensors = weights, plans, tensors
        if self._sparsifier.model is None and self._sparsifier.names:
            self._sparsifier.attach(self._model)

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`: through its mask, where it has one."""
        if fqn in self._written:
            return self._written.pop(fqn)  # bit for bit what the mask makes of it
        if fqn in self._sparsifier.names:
            return self._sparsifier.get_data(fqn, return_original=False)
        return tensor

    def write(
        self, row: PrunedWeight, keep: Tensor, value: Tensor, bias: tuple[Tensor, Tensor] | None
    ) -> None:
        """See `Store.write`."""
        fqn = row.fqn
        if self._put_mask is None:
            configs = {name: plan.config for name, plan in self._plans.items()}
            self._put_mask = mask_one_by_one(self._model, self._sparsifier, self._weights, configs)
        self._put_mask(fqn)
        weight, mask = self._tensors[fqn], self._sparsifier.get_mask(fqn)
        beneath = select(keep, value, weight)
        written = [(weight, beneath), (mask, keep.to(mask.dtype))] + ([bias] if bias else [])
        before = [tensor.clone() for tensor, _ in written]
        try:
            for tensor, new in written:
                tensor.copy_(new)
            self._sparsifier.state[fqn][DONE] = True
        except BaseException:
            for (tensor, _), old in zip(written, before, strict=True):
                tensor.copy_(old)
            raise
        if value.stride() == weight.stride():
            self._written = {fqn: value}
