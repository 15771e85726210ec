"""Low-rank factors on a sparse base, which merge without a loss: they train under the mask."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fx_sparsity.sparsifier import MaskError, SparsityRecord
from fx_sparsity.sparsifier.target import check_maskable, owners_by_identity
from fx_sparsity.sparsifier.wrappers import owner_of


class LowRank(nn.Module):
    """`weight + scale * up @ down` where the mask keeps, zero elsewhere.

    Args:
        weight: [out, in]; for shape, dtype and device.
        keep: boolean, of the weight's shape.
        rank: of the factors.
        scale: of their product.
    """

    keep: Tensor

    def __init__(self, weight: Tensor, keep: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        out, inner = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, inner))
        self.up = nn.Parameter(weight.new_zeros(out, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.register_buffer("keep", keep.to(weight.device), persistent=False)
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """The sum under the mask."""
        return torch.where(self.keep, weight + self.scale * (self.up @ self.down), 0)


class SparseLoRA:
    """Trainable low-rank factors on the weights of a squashed model; the weights are frozen.

    What is trained is what is merged: factors act under the mask from the first step, unlike those
    that are masked at the end only. `up` begins at zero, so that the model is what it was.

    Args:
        model: squashed; changed in place. Its other parameters stay as they are.
        record: what `squash` returned; weights that are no matrices are passed over, see `dense`.
        rank: of the factors.
        alpha: their product counts `alpha / rank`.

    Attributes:
        factors: FQN -> factors.
        dense: FQN -> why a weight of the record has none.

    Raises:
        MaskError: a recorded weight that the model lacks, of another shape, or still masked or
            otherwise parametrized; nothing was changed.
        ValueError: a rank below 1.

    Examples:
        >>> from fx_sparsity.training import SparseLoRA
        >>> model, sparsifier = nn.Linear(8, 4), fxs.WeightNormSparsifier()
        >>> model = fxs.prepare(model, sparsifier, (torch.randn(1, 8),), "2:4")
        >>> sparsifier.step()
        >>> model, record = fxs.squash(model, sparsifier)
        >>> lora = SparseLoRA(model, record, rank=2)
        >>> optimizer = torch.optim.AdamW(lora.parameters())
        >>> model(torch.randn(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> lora.merge()
        >>> fxs.verify(model, record).ok
        True
    """

    def __init__(
        self, model: nn.Module, record: SparsityRecord, rank: int = 8, alpha: float = 16.0
    ) -> None:
        if rank < 1:
            raise ValueError(f"expected a rank of 1 or more, found {rank}")
        self.factors: dict[str, LowRank] = {}
        self.dense: dict[str, str] = {}
        owners = owners_by_identity(model)
        planned = {}
        for name, mask in record.items():
            owner, attribute = owner_of(model, name)
            if owner is None:
                raise MaskError(f"{name}: expected a weight of shape {mask.shape}, found nothing")
            weight = check_maskable(name, owner, attribute)
            if tuple(weight.shape) != mask.shape:
                found = tuple(weight.shape)
                raise MaskError(f"{name}: expected a weight of shape {mask.shape}, found {found}")
            if weight.ndim != 2:
                self.dense[name] = f"low-rank factors need a matrix, found {weight.ndim} dimensions"
                continue
            planned[name] = (weight, mask.keep, owners[id(weight)])
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        for name, (weight, keep, places) in planned.items():
            self.factors[name] = LowRank(weight.detach(), keep, rank, alpha / rank)
            weight.requires_grad_(False)
            for module, attribute in places:
                parametrize.register_parametrization(module, attribute, self.factors[name])
            self._places[name] = places

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors' parameters, for an optimizer."""
        for factors in self.factors.values():
            yield from factors.parameters()

    def merge(self) -> None:
        """Make the sums the weights, which may be trained again, and take the factors off."""
        for name, places in self._places.items():
            module, attribute = places[0]
            merged = getattr(module, attribute).detach()
            for module, attribute in places:
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            weight = getattr(*places[0])
            with torch.no_grad():
                weight.copy_(merged)
            weight.requires_grad_()
            self.factors.pop(name)
        self._places = {}
