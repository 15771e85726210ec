"""The inputs of all weights: batches walk through the graphs, or the running model is observed.

What is observed is the whole model at once, or its repeated blocks in turn.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fx_sparsity.pruning.batches import Batch, Captured, Frame, canonical_names
from fx_sparsity.pruning.bias import fits
from fx_sparsity.pruning.observe import observe
from fx_sparsity.pruning.plan import shared_inputs
from fx_sparsity.pruning.pruner import CalibrationError, Pruner, Store
from fx_sparsity.pruning.reconstruction import Rebuilder
from fx_sparsity.pruning.stages import Stages, describe, find_blocks
from fx_sparsity.pruning.walk import Walk


class Calibration:
    """FQN after FQN, each when the pruner has taken in all inputs of the weight.

    Args:
        frame: the model as it was captured.
        pruner: takes the inputs.
        store: how the batches see weights that are done already.
        batches: all of them.
        sequential: whether the batches go on with what the pruned weights before give out.
        all_experts: see `prune`.
        rebuilder: rebuilds the blocks; None where they are not to be.

    Raises:
        CalibrationError: graphs that use the weights in different orders.
    """

    def __init__(
        self,
        frame: Frame,
        pruner: Pruner,
        store: Store,
        batches: Sequence[Batch],
        sequential: bool = True,
        all_experts: bool = False,
        rebuilder: Rebuilder | None = None,
    ) -> None:
        self._frame, self._pruner, self._batches = frame, pruner, batches
        self._walks: list[Walk] = []
        self._blocks: list[nn.Module] = []
        self._asked, self._all_experts = sequential, all_experts
        self._rebuilder = rebuilder
        if rebuilder is not None and not (sequential and frame.captured):
            why = frame.reason if sequential else "sequential=False"
            raise CalibrationError(f"reconstruction: blocks are rebuilt along a graph ({why})")
        if pruner.plans and frame.captured:
            self._walks = self._through_graphs(store)
        if sequential and not frame.captured:
            self._blocks = find_blocks(frame.model, pruner.weights.values())
        if all_experts and not any(walk.is_routed for walk in self._walks):
            raise CalibrationError(
                "all_experts: no router of these weights was found, which takes a graph with a "
                f"topk in it ({frame.reason}); leave it out"
            )

    @property
    def sequential(self) -> bool:
        """Whether the batches go on with what pruned weights give out."""
        return self._asked and bool(self._frame.captured or self._blocks)

    @property
    def reason(self) -> str:
        """How the inputs come about."""
        if self._frame.captured:
            return self._frame.reason if self._asked else "asked for"
        in_turn = f"{describe(self._blocks)} in turn"
        how = in_turn if self._blocks else "the running model was observed"
        return f"{self._frame.reason}, {how}"

    @property
    def activation_bytes(self) -> int:
        """The most that activations of all batches took at a stop."""
        return sum(walk.peak for walk in self._walks)

    def __iter__(self) -> Iterator[str]:
        if not self._frame.captured:
            return self._in_turn() if self._blocks else self._observed()
        steps = self._steps()
        return steps if self.sequential else iter(list(steps))

    def _steps(self) -> Iterator[str]:
        """The weights of the graphs, block by block where blocks are rebuilt."""
        if self._rebuilder is not None:
            yield from self._rebuilder.steps(self._walks)
        elif self._walks:
            for fqn in self._walks[0].order:
                for walk in self._walks:
                    walk.advance(fqn)
                yield fqn

    def _through_graphs(self, store: Store) -> list[Walk]:
        pruner, plans = self._pruner, self._pruner.plans
        named = canonical_names(self._frame.weights)
        walks: list[Walk] = []
        shared: list[Mapping[str, str]] = []
        for captured, uses in zip(self._frame.captured, self._frame.uses, strict=True):
            counted = [u for u in uses if u.fqn in plans and plans[u.fqn].counts(u.use)]
            arguments = (named, pruner.columns, store.read, pruner.take, pruner.refuse, pruner.note)
            in_blocks = self._rebuilder is not None
            walk = Walk(
                captured.graph, captured.batches, counted, *arguments, self._all_experts, in_blocks
            )
            walks.append(walk)
            shared.append(shared_inputs(walks[-1].order, counted, plans))
        _check_orders(walks, self._frame.captured)
        if self.sequential:
            pruner.shares = dict(set.intersection(*(set(found.items()) for found in shared)))
        return walks

    def _observed(self) -> Iterator[str]:
        """All weights at once, after the model has run."""
        self._correct(observe(self._frame.model, self._batches, self._pruner))
        yield from self._pruner.plans

    def _in_turn(self) -> Iterator[str]:
        """The weights of one block at once, after the model has run that far."""
        stages = Stages(self._frame.model, self._batches, self._pruner, self._blocks)
        self._correct(stages.biases)
        self._blocks = stages.called
        for stage, fqns in stages.order.items():
            stages.observe(stage)
            yield from fqns

    def _correct(self, found: Mapping[str, nn.Parameter]) -> None:
        """Tell the pruner the biases that it may correct."""
        pruner = self._pruner
        if pruner.biases is not None:
            pruner.biases = {fqn: b for fqn, b in found.items() if fits(b, pruner.plans[fqn])}


def _check_orders(walks: Sequence[Walk], captured: Sequence[Captured]) -> None:
    first = walks[0].order
    for walk, found in zip(walks, captured, strict=True):
        if walk.order != first:
            differ = sorted({*first} ^ {*walk.order}) or [
                a for a, b in zip(first, walk.order, strict=True) if a != b
            ]
            raise CalibrationError(
                f"batches {captured[0].batches[0].number} and {found.batches[0].number} take "
                f"graphs that use the weights in another order, from {differ[0]} on; "
                "calibrate with batches of one shape"
            )
