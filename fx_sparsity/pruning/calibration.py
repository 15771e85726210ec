"""The inputs of all weights: batches walk through the graphs, or the running model is observed.

What is observed is the whole model at once, or its repeated blocks in turn.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import nn

from fx_sparsity.pruning.batches import Batch, Captured, Frame, canonical_names
from fx_sparsity.pruning.bias import fits
from fx_sparsity.pruning.methods.calibrated import Sequential
from fx_sparsity.pruning.observe import observe
from fx_sparsity.pruning.plan import shared_inputs
from fx_sparsity.pruning.pruner import CalibrationError, Pruner
from fx_sparsity.pruning.reconstruction import Rebuilder
from fx_sparsity.pruning.stages import Stages, describe, find_blocks
from fx_sparsity.pruning.stores import Store
from fx_sparsity.pruning.walk import Walk, advance


class Calibration:
    """FQN after FQN, each when the pruner has taken in all inputs of the weight.

    Args:
        frame: the model as it was captured.
        pruner: takes the inputs.
        store: how the batches see weights that are done already.
        batches: all of them.
        sequential: whether the batches go on with what the pruned weights before give out, or the
            pruned blocks.
        all_experts: see `prune`.
        rebuilder: rebuilds the blocks; None where they are not to be.

    Raises:
        CalibrationError: graphs that use the weights in different orders, or whose blocks differ.
    """

    def __init__(
        self,
        frame: Frame,
        pruner: Pruner,
        store: Store,
        batches: Sequence[Batch],
        sequential: Sequential = True,
        all_experts: bool = False,
        rebuilder: Rebuilder | None = None,
    ) -> None:
        self._frame, self._pruner, self._batches = frame, pruner, batches
        self._walks: list[Walk] = []
        self._blocks: list[nn.Module] = []
        self._asked, self._all_experts = sequential, all_experts
        self._rebuilder = rebuilder
        if rebuilder is not None:
            self._check_reconstruction()
        if pruner.plans and frame.captured:
            self._walks = self._through_graphs(store)
        if sequential and not frame.captured:
            self._blocks = find_blocks(frame.model, pruner.weights.values())
        if all_experts and not any(walk.is_routed for walk in self._walks):
            raise CalibrationError(
                "all_experts: no router of these weights was found, which takes a graph with a "
                f"topk in it ({frame.reason}); leave it out"
            )

    def _check_reconstruction(self) -> None:
        if not self._asked:
            raise CalibrationError("reconstruction: rebuilds in turn; leave out sequential=False")
        if not self._frame.captured:
            raise CalibrationError(
                "reconstruction: blocks are rebuilt along a graph, and there is none; of a "
                "wrapper such as DistributedDataParallel, pass what it wraps. "
                f"{self._frame.error}"
            )
        if torch.is_inference_mode_enabled():
            raise CalibrationError(
                "reconstruction: gradients are needed, which torch.inference_mode rules out; "
                "call prune outside of it"
            )

    @property
    def sequential(self) -> bool:
        """Whether the batches go on with what pruned weights give out."""
        return bool(self._asked and (self._frame.captured or self._blocks))

    @property
    def reason(self) -> str:
        """How the inputs come about."""
        if self._frame.captured:
            in_blocks = ", block by block" if self._by_block else ""
            return f"{self._frame.reason}{in_blocks}" if self._asked else "asked for"
        in_turn = f"{describe(self._blocks)} in turn"
        how = in_turn if self._blocks else "the running model was observed"
        return f"{self._frame.reason}, {how}"

    @property
    def _by_block(self) -> bool:
        """Whether weights of a graph wait for all weights of their block."""
        return self._asked == "blocks" and any(b.path for walk in self._walks for b in walk.blocks)

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
        """The weights of the graphs, block by block where that is asked for."""
        if self._rebuilder is not None:
            yield from self._rebuilder.steps(self._walks, self._by_block)
        elif self._by_block:
            yield from self._in_blocks()
        elif self._walks:
            yield from advance(self._walks, self._walks[0].order, together=False)

    def _in_blocks(self) -> Iterator[str]:
        """All weights of a block when it has run dense; then it runs pruned."""
        walks = self._walks
        for block, fqns in groupby(walks[0].order, walks[0].block_of):
            if block is None:
                yield from advance(walks, fqns, together=False)
                continue
            own = [walk.blocks[walks[0].blocks.index(block)] for walk in walks]
            entered = [walk.enter(found) for walk, found in zip(walks, own, strict=True)]
            yield from advance(walks, fqns, together=True)
            for walk, found, values in zip(walks, own, entered, strict=True):
                walk.leave(found, values)

    def _through_graphs(self, store: Store) -> list[Walk]:
        pruner, plans = self._pruner, self._pruner.plans
        named = canonical_names(self._frame.weights)
        walks: list[Walk] = []
        shared: list[Mapping[str, str]] = []
        for captured, uses in zip(self._frame.captured, self._frame.uses, strict=True):
            counted = [u for u in uses if u.fqn in plans and plans[u.fqn].counts(u.use)]
            arguments = (named, pruner.columns, store.read, pruner.take, pruner.refuse)
            in_blocks = self._rebuilder is not None or self._asked == "blocks"
            how = (pruner.note, self._frame.keep, self._all_experts, in_blocks)
            walk = Walk(captured.graph, captured.batches, counted, *arguments, *how)
            walks.append(walk)
            shared.append(shared_inputs(walks[-1].order, counted, plans))
        _check_orders(walks, self._frame.captured)
        if any([b.path for b in w.blocks] != [b.path for b in walks[0].blocks] for w in walks):
            raise CalibrationError(
                "batches take graphs of different blocks, which cannot be pruned together; "
                "calibrate with batches of one shape"
            )
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
