"""Without a graph, the repeated blocks of a running model in turn, such as its layers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fx_sparsity.pruning.batches import Batch
from fx_sparsity.pruning.observe import Biases, Observer, take_into
from fx_sparsity.pruning.pruner import Pruner

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(model: nn.Module, weights: Iterable[Tensor]) -> list[nn.Module]:
    """Modules that a container holds beside others of their class, such as a model's layers.

    Args:
        model: to look through, from the outside in: what a block holds makes no blocks.
        weights: a block holds some of these.
    """
    wanted = {id(weight) for weight in weights}
    blocks: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        held = [
            child
            for child in module.children()
            if not wanted.isdisjoint(map(id, child.parameters()))
        ]
        kinds = Counter(map(_kind, held))
        for child in held:
            repeated = isinstance(module, _CONTAINERS) and kinds[_kind(child)] > 1
            if repeated and not isinstance(child, _CONTAINERS):
                blocks.append(child)
            else:
                look(child)

    look(model)
    return blocks


def describe(blocks: Sequence[nn.Module]) -> str:
    """How many there are of which class."""
    kinds = Counter(_kind(block).__name__ for block in blocks)
    return " and ".join(f"{count} blocks of {kind}" for kind, count in kinds.items())


def _kind(module: nn.Module) -> type[nn.Module]:
    return parametrize.type_before_parametrizations(module)


class Stages:
    """A running model, cut into stages: what lies before the first block, the block, and so on.

    The stage of a weight is the last one in which it is used, over all batches of the dense model.
    A model that goes back to an earlier block stays in the stage that it had come to.

    Args:
        model: in the mode that it is to run in.
        batches: to run.
        pruner: takes the inputs of its weights.
        blocks: see `find_blocks`; in the order in which they are first called.

    Attributes:
        biases: see `observe`.
        called: blocks that the model calls as modules, so that they show how far it has come.
        order: stage -> FQNs of its weights, from first to last. Weights that no batch uses are in
            the last.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        pruner: Pruner,
        blocks: Sequence[nn.Module],
    ) -> None:
        self._model, self._batches, self._pruner = model, batches, pruner
        self._position = _Position(blocks)
        biases, last = Biases(model), dict.fromkeys(pruner.plans, 0)
        seen: set[str] = set()

        def on_use(fqn: str, *_: Any) -> None:
            seen.add(fqn)
            last[fqn] = max(last[fqn], self._position.stage)

        self._run(Observer(pruner.weights, pruner.columns, on_use, biases), None)
        self.called = list(self._position.places)
        end = 2 * len(self.called)
        self.biases = biases.found
        self.order: dict[int, list[str]] = {}
        for fqn, stage in sorted(last.items(), key=lambda item: item[1]):
            self.order.setdefault(stage if fqn in seen else end, []).append(fqn)
        self.order = dict(sorted(self.order.items()))

    def observe(self, stage: int) -> None:
        """Take in all inputs of the weights of one stage; the model is not run beyond it."""
        weights = {fqn: self._pruner.weights[fqn] for fqn in self.order[stage]}
        observer = Observer(weights, self._pruner.columns, take_into(self._pruner))
        self._run(observer, stage)

    @torch.no_grad()
    def _run(self, observer: Observer, last: int | None) -> None:
        """Run all batches, not beyond a stage."""
        with self._position:
            for batch in self._batches:
                self._position.start(last)
                observer.batch = batch
                with suppress(GeneratorExit), observer:
                    batch.call(self._model)


class _Position:
    """How far a call has come: the stage is 0 before the first block is begun, 1 in it, and so on.

    Hooks tell; they are on the blocks inside of `with`.

    Attributes:
        places: block -> its place among those that were called, the first call of each counting.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks, self.places = blocks, dict[nn.Module, int]()
        self._handles: list[Any] = []
        self.start(None)

    def start(self, last: int | None) -> None:
        """A call begins, that may go on to stage `last`; None for all."""
        self.stage, self._last = 0, last

    def __enter__(self) -> None:
        for block in self._blocks:
            self._handles.append(block.register_forward_pre_hook(self._begin))
            self._handles.append(block.register_forward_hook(self._end))

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, block: nn.Module, *_: Any) -> None:
        self._come_to(2 * self.places.setdefault(block, len(self.places)) + 1)

    def _end(self, block: nn.Module, *_: Any) -> None:
        self._come_to(2 * self.places[block] + 2)

    def _come_to(self, stage: int) -> None:
        self.stage = max(self.stage, stage)
        if self._last is not None and self.stage > self._last:
            raise GeneratorExit  # no `Exception`, which the model might catch
