"""What pruning took from a block is made up for by all that the block keeps.

After the weights of a block are pruned, their kept values, and the norms and biases of the block,
are optimized together, masks held, until the block gives out what it did before (EBFT, arXiv
2402.12419; Wanda++, arXiv 2503.04992; a study of it, arXiv 2510.14444). The graph says what a block
is and what it gives out; in memory are its inputs and outputs, and the optimizer's state of one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from fx_sparsity.pruning.batches import Batch
from fx_sparsity.pruning.graph_blocks import Block
from fx_sparsity.pruning.held_out import spread
from fx_sparsity.pruning.pruner import Pruner
from fx_sparsity.pruning.report import RebuiltBlock
from fx_sparsity.pruning.stores import HeldStore
from fx_sparsity.pruning.walk import Walk, advance

_WARM_UP = 4  # steps in which the learning rate rises
_LEAST = 0.05  # of the learning rate, at the end
_BETAS = (0.9, 0.95)
_FLOOR = 1e-3  # of the mean square of a token's outputs: what is smaller counts as that


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are rebuilt, see `prune`.

    Attributes:
        steps: of Adam in each block, each of one batch.
        learning_rate: at the most; it rises for four steps and falls as a cosine.
        targets: `"dense"`: what the dense model's block gives out, so that a block makes up for
            those before it, too (as GPTAQ does, arXiv 2504.02692); activations of both models are
            held. `"pruned"`: what the dense block makes of the inputs that it really gets.
        held_out: share of the batches that are not optimized on. A block is rebuilt only where that
            lowers the error on them. With fewer than four batches there are none; where `prune`
            holds some out, it is those.
        autocast: dtype in which blocks are computed meanwhile, such as `torch.bfloat16`; None for
            the model's own. What is optimized is held in float32.
    """

    steps: int = 64
    learning_rate: float = 1e-3
    targets: Literal["dense", "pruned"] = "dense"
    held_out: float = 0.125
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least one, found {self.steps!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected more than 0, found {self.learning_rate!r}")
        if self.targets not in ("dense", "pruned"):
            raise ValueError(f'targets: expected "dense" or "pruned", found {self.targets!r}')
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share in [0, 1), found {self.held_out!r}")


class _Sample(NamedTuple):
    """One batch at one block.

    Attributes:
        walk: that it goes along.
        block: in that walk.
        batch: which.
        entered: what lives at the block's beginning.
        targets: what the block is to give out.
    """

    walk: Walk
    block: Block
    batch: Batch
    entered: Mapping[fx.Node, Any]
    targets: list[Tensor]

    def keeps(self) -> Iterator[Tensor | None]:
        """Which tokens of each target count, see `Padding.find`."""
        for node, target in zip(self.block.outputs, self.targets, strict=True):
            yield self.batch.padding.find(target.shape, self.walk.is_of_decoder(node))


class Rebuilder:
    """Goes through the weights block by block, and rebuilds each block.

    Args:
        options: how.
        pruner: prunes the weights, into `store`.
        store: holds them until their block is rebuilt.

    Attributes:
        blocks: what has been rebuilt.
    """

    def __init__(self, options: Reconstruction, pruner: Pruner, store: HeldStore) -> None:
        self.options, self.blocks = options, list[RebuiltBlock]()
        self._pruner, self._store = pruner, store

    def steps(self, walks: Sequence[Walk], by_block: bool) -> Iterator[str]:
        """FQN after FQN, each to be pruned at once.

        Args:
            walks: through the graphs.
            by_block: whether the weights of a block are pruned when all of them have their inputs.
        """
        if not walks:
            return
        ahead = [_Ahead(walk) for walk in walks] if self.options.targets == "dense" else None
        for block, fqns in groupby(walks[0].order, walks[0].block_of):
            if block is None:
                yield from advance(walks, fqns, together=False)
                continue
            found = [walk.blocks[walks[0].blocks.index(block)] for walk in walks]
            samples = self._enter(walks, found, ahead)
            yield from advance(walks, fqns, by_block)
            self._rebuild(samples)
            for walk, own in zip(walks, found, strict=True):
                walk.leave(own, [sample.entered for sample in samples if sample.walk is walk])

    def abandon(self) -> None:
        """Forget the block that was begun: none of it is written."""
        del self._pruner.pruned[len(self._pruner.pruned) - len(self._store.held) :]
        self._store.drop()

    def _enter(
        self, walks: Sequence[Walk], blocks: Sequence[Block], ahead: "Sequence[_Ahead] | None"
    ) -> list[_Sample]:
        samples = []
        for place, (walk, block) in enumerate(zip(walks, blocks, strict=True)):
            entered = walk.enter(block)
            if ahead is None:
                targets = [walk.keep(walk.outputs(block, values)) for values in entered]
            else:
                targets = ahead[place].outputs(block)
            for batch, values, wanted in zip(walk.batches, entered, targets, strict=True):
                samples.append(_Sample(walk, block, batch, values, wanted))
        self._store.hold()
        return sorted(samples, key=lambda sample: sample.batch.number)

    def _rebuild(self, samples: Sequence[_Sample]) -> None:
        """Optimize what a block keeps, and write the whole block."""
        first = samples[0]
        rebuilt = _Kept(self._store, first.walk.parameters(first.block))
        used, unused = _split(samples, self.options.held_out)
        judged = unused or used
        before = self._error(judged, rebuilt)
        note = _why_not(rebuilt, before)
        if not note:
            with torch.enable_grad():
                self._optimize(used, rebuilt)
        after = self._error(judged, rebuilt)
        better = after < before
        if not better and not note:
            where = "batches that were held out" if unused else "the batches"
            note = f"not rebuilt: that gave an error of {after:.3g} on {where}"
        self._store.write_held(rebuilt.found() if better else {}, rebuilt.parameters)
        self.blocks.append(
            RebuiltBlock(
                path=first.block.path,
                before=before,
                after=after if better else before,
                held_out=len(unused),
                note=note,
            )
        )

    def _optimize(self, samples: Sequence[_Sample], kept: "_Kept") -> None:
        steps = self.options.steps
        optimizer = torch.optim.Adam(
            list(kept.tensors.values()), self.options.learning_rate, betas=_BETAS
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            place = step % len(samples)
            if place == 0:
                order = torch.randperm(len(samples), generator=generator).tolist()
            loss = self._loss(samples[order[place]], kept)
            if not loss.requires_grad:
                return  # what is read of the block does not follow from what is kept
            optimizer.zero_grad()
            loss.backward()
            kept.mask_gradients()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def _error(self, samples: Sequence[_Sample], kept: "_Kept") -> float:
        """Mean of the relative error over batches."""
        losses = [self._loss(sample, kept) for sample in samples]
        return float(torch.stack(losses).mean())

    def _loss(self, sample: _Sample, kept: "_Kept") -> Tensor:
        device = next(iter(sample.targets)).device if sample.targets else torch.device("cpu")
        dtype = self.options.autocast
        casting = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        with casting:
            outputs = sample.walk.outputs(sample.block, sample.entered, kept.read)
        losses = [
            relative_loss(found, wanted, keep)
            for found, wanted, keep in zip(outputs, sample.targets, sample.keeps(), strict=True)
        ]
        return torch.stack(losses).mean() if losses else torch.zeros(())


def relative_loss(found: Tensor, wanted: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over tokens of ||found - wanted||^2 / ||wanted||^2, float32, of no dimensions.

    The first tokens of a language model have a hundred times the norm of the others: a mean of
    plain squares would be about them alone.

    Args:
        found: [batch, tokens, channels] or [tokens, channels]; of other tensors each element of the
            first axis is one token.
        wanted: of that shape.
        keep: boolean, of its leading axes: which tokens count; None for all.
    """
    found, wanted = found.float(), wanted.float()
    if wanted.ndim not in (2, 3):
        found, wanted = found.reshape(len(found), -1), wanted.reshape(len(wanted), -1)
    missed, sizes = (found - wanted).square().sum(-1), wanted.square().sum(-1)
    if keep is not None:
        missed, sizes = missed[keep.to(missed.device)], sizes[keep.to(sizes.device)]
    floor = _FLOOR * sizes.mean()
    return (missed / sizes.clamp(min=floor.clamp(min=torch.finfo(torch.float32).tiny))).mean()


class _Ahead:
    """The dense model's activations, one block ahead of what is pruned."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._values, self._at = walk.begin(), 0
        self._next = self._go_on(walk.blocks[0])

    def outputs(self, block: Block) -> list[list[Tensor]]:
        """What the dense block gives out, of each batch; and go on to the end of the next one."""
        found, later = self._next, self._walk.blocks[self._walk.blocks.index(block) + 1 :]
        self._next = self._go_on(later[0]) if later else []
        return found

    def _go_on(self, block: Block) -> list[list[Tensor]]:
        walk = self._walk
        found = [walk.keep(walk.run_on(self._at, block, values)) for values in self._values]
        self._at = block.end
        return found


class _Kept:
    """What a block keeps, in float32, to be optimized.

    Args:
        store: holds the pruned weights of the block.
        parameters: name -> parameter that the block alone computes with; of these, vectors are
            optimized, too.
    """

    def __init__(self, store: HeldStore, parameters: Mapping[str, Tensor]) -> None:
        self._store, self._masks = store, dict[str, Tensor]()
        self.parameters = parameters
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in parameters.items():
            solved = store.held.get(name)
            if solved is not None:
                self._masks[name] = solved.keep
            elif tensor.ndim > 1 or not tensor.is_floating_point():
                continue
            value = store.read(name, tensor).detach().float().clone()
            self.tensors[name] = value.requires_grad_()

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as a block is to see it."""
        if name in self.tensors:
            return self.tensors[name].to(tensor.dtype)
        return self._store.read(name, tensor)

    def mask_gradients(self) -> None:
        """What is pruned stays zero: Adam moves nothing whose gradients were always zero."""
        for name, keep in self._masks.items():
            grad = self.tensors[name].grad
            if grad is not None:
                grad.mul_(keep)

    def found(self) -> dict[str, Tensor]:
        """Name -> value, in the dtype of the model's tensor."""
        return {
            name: value.detach().to(self.parameters[name].dtype)
            for name, value in self.tensors.items()
        }


def _split(samples: Sequence[_Sample], share: float) -> tuple[list[_Sample], list[_Sample]]:
    """Those to optimize on, and those held out."""
    places = {place for place, sample in enumerate(samples) if sample.batch.held_out}
    if not places and share and len(samples) >= 4:
        places = spread(len(samples), share)
    held = [sample for place, sample in enumerate(samples) if place in places]
    return [sample for place, sample in enumerate(samples) if place not in places], held


def warm_cosine(steps: int) -> Callable[[int], float]:
    """Step -> factor of a learning rate: it rises for four steps and falls as a cosine to 5%."""

    def factor(step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return min(1, (step + 1) / _WARM_UP) * (_LEAST + (1 - _LEAST) * cosine)

    return factor


def _why_not(kept: _Kept, before: float) -> str:
    """Why there is nothing to rebuild; empty where there is."""
    if not kept.tensors:
        return "not rebuilt: it computes with nothing of its own that is pruned"
    return "" if before else "not rebuilt: it gives out what the dense one does"
