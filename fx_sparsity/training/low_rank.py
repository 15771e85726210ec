"""Low-rank adapters (LoRA, arXiv 2106.09685) on a sparse base, which know its masks.

What an adapter adds is masked while it is trained, so that merging it gives the very weight that
was trained, with its zeros. An adapter that is blind to them loses at the merge what it had put
there.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fx_sparsity.sparsifier.record import SparsityRecord
from fx_sparsity.sparsifier.target import MaskError, owners_by_identity
from fx_sparsity.sparsifier.wrappers import owner_of, unwrapped


@dataclass(frozen=True)
class LowRank:
    """What `recover` is to train in the place of the kept weights themselves.

    Attributes:
        rank: of what is added to each pruned weight, [out, rank] times [rank, in].
        scale: that it is multiplied by.
    """

    rank: int = 16
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: expected at least one, found {self.rank!r}")


class Adapter(nn.Module):
    """Parametrization: a weight, and where it is kept a product of low rank on top.

    Args:
        keep: boolean, of the weight's shape, [out, ...]: the mask.
        options: rank and scale.
    """

    keep: Tensor

    def __init__(self, keep: Tensor, options: LowRank) -> None:
        super().__init__()
        out, width = keep.flatten(1).shape
        self.register_buffer("keep", keep, persistent=False)
        bound = 1 / math.sqrt(width)
        down = torch.empty(options.rank, width, device=keep.device).uniform_(-bound, bound)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(out, options.rank, device=keep.device))
        self.scale = options.scale

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with what is added, in its own dtype; zero where it is masked."""
        added = (self.scale * (self.up @ self.down)).view_as(weight)
        return torch.where(self.keep, weight + added.to(weight.dtype), 0)


class Adapters:
    """Adapters on the pruned weights of a squashed model; on from here to `merge` or `remove`.

    Args:
        model: changed in place. Its own parameters are left as they are until `merge`.
        record: what `squash` returned.
        options: rank and scale.

    Attributes:
        parameters: FQN of a weight, with `down` or `up` behind it -> parameter to train.

    Raises:
        MaskError: a recorded weight that the model lacks, of another shape, still masked or
            parametrized by something else, or of one dimension; nothing was changed.
    """

    def __init__(self, model: nn.Module, record: SparsityRecord, options: LowRank) -> None:
        owners = owners_by_identity(unwrapped(model))
        self._weights = dict(_plain_weights(model, record))
        self._owners = {name: owners[id(weight)] for name, weight in self._weights.items()}
        self._orders = [  # optimizers know parameters by it
            (owner, list(owner._parameters))
            for found in self._owners.values()
            for owner, _ in found
        ]
        self._adapters: dict[str, Adapter] = {}
        for name, weight in self._weights.items():
            adapter = Adapter(record[name].keep.to(weight.device), options)
            self._adapters[name] = adapter
            for owner, attribute in self._owners[name]:
                parametrize.register_parametrization(owner, attribute, adapter)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See the class."""
        return {
            f"{name}.{part}": parameter
            for name, adapter in self._adapters.items()
            for part, parameter in adapter.named_parameters()
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Write into each weight what it was with its adapter, and take the adapters off."""
        for name, weight in self._weights.items():
            weight.copy_(self._adapters[name](weight))
        self.remove()

    def remove(self) -> None:
        """Take the adapters off; the weights are what they were."""
        for owners in self._owners.values():
            for owner, attribute in owners:
                parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
        for owner, names in self._orders:
            for key in names:
                owner._parameters[key] = owner._parameters.pop(key)
        self._owners, self._orders = {}, []


def _plain_weights(model: nn.Module, record: SparsityRecord) -> Iterable[tuple[str, nn.Parameter]]:
    for name, entry in record.items():
        owner, attribute = owner_of(model, name)
        weight: Any = getattr(owner, attribute, None)
        if owner is not None and parametrize.is_parametrized(owner, attribute):
            raise MaskError(f"{name} is still masked, or parametrized; squash first")
        if not isinstance(weight, nn.Parameter) or tuple(weight.shape) != entry.shape:
            found = tuple(weight.shape) if isinstance(weight, Tensor) else "nothing"
            raise MaskError(f"{name}: expected a weight of shape {entry.shape}, found {found}")
        if weight.ndim < 2:
            raise MaskError(f"{name}: has one dimension, and no low rank; leave it unpruned")
        yield name, weight
