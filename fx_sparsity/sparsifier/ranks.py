"""Masks that differ between the ranks of a data-parallel model: noticed, without anyone waiting.

Every rank steps by itself. `DistributedDataParallel` puts rank 0's buffers, masks among them, in
the place of the others' at the next forward, or leaves them as they are; neither says a word.
"""

import itertools
import json
from collections.abc import Mapping
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fx_sparsity.masks.bits import pack_bits
from fx_sparsity.sparsifier.record import masks_checksum
from fx_sparsity.sparsifier.target import MaskError

_PARALLEL: WeakSet[nn.Module] = WeakSet()
"""Modules that `DistributedDataParallel` was put around."""
_ORDINALS = itertools.count()


def note_parallel(module: nn.Module, name: str, submodule: nn.Module) -> None:
    """Note what `DistributedDataParallel` is put around."""
    if name == "module" and isinstance(module, DistributedDataParallel):
        _PARALLEL.add(submodule)


class RankCheck:
    """Compares the masks of one sparsifier with those of the other ranks, as far as they are known.

    Checksums lie in the process group's store; those of a step are there for all who come after the
    next gradients were reduced.
    """

    def __init__(self) -> None:
        self._ordinal: int | None = None
        self._steps = 0

    def tell(self, model: nn.Module | None, masks: Mapping[str, Tensor]) -> None:
        """Let the other ranks know of the masks of one step."""
        if not _is_parallel(model):
            return
        if self._ordinal is None:
            self._ordinal = next(_ORDINALS)
        self._steps += 1
        sums = {name: masks_checksum(pack_bits(mask != 0).cpu()) for name, mask in masks.items()}
        store, rank = _store(), dist.get_rank()
        store.set(self._key(self._steps, rank), json.dumps(sums))
        if self._steps > 2:
            store.delete_key(self._key(self._steps - 2, rank))

    def check(self, model: nn.Module | None) -> None:
        """Compare what the last step gave.

        Raises:
            MaskError: naming a weight whose masks differ, and the rank.
        """
        if not self._steps or not _is_parallel(model):
            return
        store, rank = _store(), dist.get_rank()
        mine = json.loads(store.get(self._key(self._steps, rank)))
        for other in range(dist.get_world_size()):
            key = self._key(self._steps, other)
            if other == rank or not store.check([key]):
                continue
            theirs = json.loads(store.get(key))
            if differ := [name for name in mine if theirs.get(name) != mine[name]]:
                raise MaskError(
                    f"{len(differ)} masks differ between ranks {rank} and {other}, such as "
                    f"{differ[0]}; in a data-parallel model all ranks need the same: rank by what "
                    "they share, or step on rank 0 alone, whose buffers the others take over"
                )

    def _key(self, step: int, rank: int) -> str:
        return f"fx_sparsity/masks/{self._ordinal}/{step}/{rank}"


def _is_parallel(model: nn.Module | None) -> bool:
    if model is None or not (dist.is_available() and dist.is_initialized()):
        return False
    return any(model is part for parallel in _PARALLEL for part in parallel.modules())


def _store() -> "dist.Store":
    return dist.distributed_c10d._get_default_store()  # torch has no public way to it
