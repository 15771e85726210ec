"""What other values of weights do to the output of a model, measured by running it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fx_sparsity.pruning.allocation.rules import Change
from fx_sparsity.pruning.batches import Batch
from fx_sparsity.pruning.pruner import CalibrationError


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Tensors that may be written into have their values again afterwards, whatever is raised."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.copy_(value)


class Effect:
    """How far the output of a model moves where some of its weights have other values.

    Args:
        model: in the mode that it is to run in; it is as before after every call.
        batches: to run.
        weights: FQN -> tensor of the model.
        change: how far two outputs are apart.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        weights: Mapping[str, Tensor],
        change: Change,
    ) -> None:
        self._model, self._batches = model, batches
        self._weights, self._change = weights, change

    @torch.no_grad()
    def of(self, values: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """The changes, summed over all batches; each runs once more than there are `values`.

        Args:
            values: FQN -> what to put in the place of the weight, of its shape; one change each.

        Raises:
            InputError: the model rejects a batch.
            CalibrationError: the model returns no floating tensor, or the changes are not finite.
        """
        changes = [0.0] * len(values)
        for batch in self._batches:
            dense = output_of(batch, batch.call(self._model))
            for place, changed in enumerate(values):
                with restored(self._weights[fqn] for fqn in changed):
                    for fqn, value in changed.items():
                        self._weights[fqn].copy_(value)
                    found = output_of(batch, batch.call(self._model))
                changes[place] += float(self._change(dense, found))
        if not all(map(math.isfinite, changes)):
            raise CalibrationError(
                "what the model returns is not finite, or becomes so where weights are pruned, so "
                "that the effect of pruning cannot be told by it"
            )
        return changes


def output_of(batch: Batch, returned: Any) -> Tensor:
    """What counts of what a model returns, see `OutputAllocation`.

    Raises:
        CalibrationError: it returns no floating tensor.
    """
    for leaf in pytree.tree_leaves(returned):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
            keep = batch.padding.find(leaf.shape, decoder=True)
            return leaf.clone() if keep is None else leaf[keep]
    raise CalibrationError("the model returns no floating tensor to go by")
