"""A model that is pruned for a while: without masks, and as it was afterwards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fx_sparsity.pruning.batches import Batch, Frame
from fx_sparsity.pruning.calibration import Calibration
from fx_sparsity.pruning.effect import restored
from fx_sparsity.pruning.methods.calibrated import Sequential
from fx_sparsity.pruning.plan import Plan
from fx_sparsity.pruning.pruner import Pruner
from fx_sparsity.pruning.report import PrunedWeight
from fx_sparsity.pruning.stores import Solved, Store, Untouched


class Trial(Untouched):
    """Writes kept values into weights, without masks, and holds them.

    Args:
        store: to read from.
        weights: FQN -> tensor to write into.

    Attributes:
        values: FQN -> what was written.
    """

    def __init__(self, store: Store, weights: Mapping[str, Tensor]) -> None:
        super().__init__(store)
        self._weights, self.values = weights, dict[str, Tensor]()

    def write(self, row: PrunedWeight, solved: Solved, bias: tuple[Tensor, Tensor] | None) -> None:
        """See `Store.write`."""
        self.values[row.fqn] = solved.value.clone()
        self._weights[row.fqn].copy_(solved.value)


@contextmanager
def pruned(
    pruner: Pruner,
    plans: Mapping[str, Plan],
    frame: Frame,
    store: Store,
    batches: Sequence[Batch],
    sequential: Sequential,
    all_experts: bool,
) -> Iterator[Trial]:
    """The model of a frame, pruned as `prune` would; its weights are as they were afterwards.

    Args:
        pruner: of all weights.
        plans: FQN -> plan of those that are to be pruned.
        frame: of the model.
        store: how the batches see weights that were pruned before.
        batches: to calibrate with.
        sequential: see `Calibration`.
        all_experts: see `Calibration`.
    """
    trial = Trial(store, pruner.weights)
    trying = pruner.looking(pruner.sparsifier, plans, trial)
    with torch.no_grad(), restored(pruner.weights[fqn] for fqn in plans):
        for fqn in Calibration(frame, trying, trial, batches, sequential, all_experts):
            trying.prune(fqn)
        yield trial
