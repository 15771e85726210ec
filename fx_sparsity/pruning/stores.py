"""Where pruned weights go: under masks, held back until a block is done, or nowhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from fx_sparsity.graph.passes import InsertMasks
from fx_sparsity.graph.put_masks import mask_one_by_one
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.pruning.batches import is_exported
from fx_sparsity.pruning.methods import CalibratedSparsifier
from fx_sparsity.pruning.methods.where import select
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.report import PrunedWeight
from fx_sparsity.quantization.grid import GRID
from fx_sparsity.sparsifier import Mask, MaskError
from fx_sparsity.sparsifier.target import graph_mask

DONE = "calibrated"
"""Counter in a sparsifier's state of a weight that has been pruned."""


class Solved(NamedTuple):
    """What a weight is to become.

    Attributes:
        fqn: of the weight.
        keep: its mask: boolean, of its shape.
        value: its kept values and zeros, of its shape and dtype.
        scales: of the grid that it was rounded to, see `Solution`; None where it was not.
    """

    fqn: str
    keep: Tensor
    value: Tensor
    scales: Tensor | None = None


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

        Raises:
            MaskError: what has been done was done to another model.
        """

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as the walk is to see it."""

    def write(self, row: PrunedWeight, solved: Solved, bias: tuple[Tensor, Tensor] | None) -> None:
        """Write mask, weight and bias; after an interruption, none of them.

        Args:
            row: tells of the weight.
            solved: what it is to become.
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

    def write(self, row: PrunedWeight, solved: Solved, bias: tuple[Tensor, Tensor] | None) -> None:
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
        bound = self._sparsifier.model
        if bound is not None and bound is not self._model and self._sparsifier.names:
            raise MaskError(
                f"the sparsifier is bound to another {type(bound).__name__}; "
                "prune this model with a fresh one"
            )
        if bound is None and self._sparsifier.names:
            if is_exported(self._model):
                self._select_in_graph(self._model)
            self._sparsifier.attach(self._model)

    def _select_in_graph(self, model: fx.GraphModule) -> None:
        """Put masks of ones where the sparsifier's own are to go; elsewhere `attach` does."""
        masks: dict[str, Mask] = {}
        for fqn in self._sparsifier.names:
            if fqn in self._weights and graph_mask(model, fqn) is None:
                ones = torch.ones(self._weights[fqn].shape, dtype=torch.bool)
                mask = Mask(ones.to(model.get_parameter(fqn).device))
                masks |= dict.fromkeys(self._weights[fqn].names, mask)
        InsertMasks(masks)(model)

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`: through its mask, where it has one."""
        if fqn in self._written:
            return self._written.pop(fqn)  # bit for bit what the mask makes of it
        if fqn in self._sparsifier.names:
            return self._sparsifier.get_data(fqn, return_original=False)
        return tensor

    def write(self, row: PrunedWeight, solved: Solved, bias: tuple[Tensor, Tensor] | None) -> None:
        """See `Store.write`."""
        self.write_all([solved], [] if bias is None else [bias])

    def write_all(self, solved: Sequence[Solved], others: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write several weights at once; after an interruption, none of them.

        Args:
            solved: the weights.
            others: tensors of the model, and what they have to become.
        """
        if self._put_mask is None:
            configs = {name: plan.config for name, plan in self._plans.items()}
            self._put_mask = mask_one_by_one(self._model, self._sparsifier, self._weights, configs)
        written = list(others)
        for fqn, keep, value, _ in solved:
            self._put_mask(fqn)
            weight, mask = self._tensors[fqn], self._sparsifier.get_mask(fqn)
            written += [(weight, select(keep, value, weight)), (mask, keep.to(mask.dtype))]
        before = [tensor.clone() for tensor, _ in written]
        states = [self._sparsifier.state[one.fqn] for one in solved]
        try:
            for tensor, new in written:
                tensor.copy_(new)
            for state, one in zip(states, solved, strict=True):
                state[DONE] = True
                if self._sparsifier.grid is not None and one.scales is not None:
                    state[GRID] = self._sparsifier.grid.to_state(one.scales)
        except BaseException:
            for (tensor, _), old in zip(written, before, strict=True):
                tensor.copy_(old)
            for state in states:
                state.pop(DONE, None)
                state.pop(GRID, None)
            raise
        self._written = {
            fqn: value
            for fqn, _, value, _ in solved
            if value.stride() == self._tensors[fqn].stride()
        }


class HeldStore:
    """A store that can hold back what it is to write, for all of it to be written at once.

    Args:
        store: to write to, and to read from.

    Attributes:
        held: FQN -> what the weight is to become, and is read as.
    """

    def __init__(self, store: MaskStore) -> None:
        self._store, self._holds = store, False
        self.how_to_resume = store.how_to_resume
        self.held: dict[str, Solved] = {}
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}

    def is_done(self, plan: Plan) -> bool:
        """See `Store.is_done`."""
        return self._store.is_done(plan)

    def begin(
        self, weights: WeightMap, plans: Mapping[str, Plan], tensors: Mapping[str, Tensor]
    ) -> None:
        """See `Store.begin`."""
        self._store.begin(weights, plans, tensors)

    def hold(self) -> None:
        """From now on write nothing, until `write_held`."""
        self._holds = True

    def read(self, fqn: str, tensor: Tensor) -> Tensor:
        """See `Store.read`: as what it is to become."""
        if fqn in self.held:
            return self.held[fqn].value
        if id(tensor) in self._biases:
            return self._biases[id(tensor)][1]
        return self._store.read(fqn, tensor)

    def write(self, row: PrunedWeight, solved: Solved, bias: tuple[Tensor, Tensor] | None) -> None:
        """See `Store.write`."""
        if not self._holds:
            self._store.write(row, solved, bias)
            return
        self.held[row.fqn] = solved
        if bias is not None:
            self._biases[id(bias[0])] = bias

    def write_held(self, values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        """Write what was held back, with other values.

        Args:
            values: name -> what the tensor is to become, of weights that are held and of others.
            others: name -> the model's tensor, of the others.
        """
        solved = [one._replace(value=values.get(fqn, one.value)) for fqn, one in self.held.items()]
        named = {id(others[n]): (others[n], v) for n, v in values.items() if n not in self.held}
        self._store.write_all(solved, list((self._biases | named).values()))
        self.drop()

    def drop(self) -> None:
        """Forget what was held back, and hold back no more."""
        self.held.clear()
        self._biases.clear()
        self._holds = False
