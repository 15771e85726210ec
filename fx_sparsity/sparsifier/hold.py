"""Fine-tuning a squashed model: the zeros stay zero, whatever the optimizer does."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fx_sparsity.sparsifier.record import SparsityRecord
from fx_sparsity.sparsifier.target import MaskError, mask_on
from fx_sparsity.sparsifier.wrappers import owner_of


class Hold:
    """Keeps masked values at zero after every step of an optimizer; see `hold`."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, pruned: dict[str, Tensor]) -> None:
        self._optimizer, self._model = optimizer, model
        self._pruned = pruned
        self._hook = optimizer.register_step_post_hook(self._after_step)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero every masked value and its optimizer state now, as after a merge of LoRA factors."""
        for name, pruned in self._pruned.items():
            owner, attribute = owner_of(self._model, name)
            weight = getattr(owner, attribute)  # loading with assign=True makes it another one
            weight.masked_fill_(pruned, 0)
            for value in self._optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(pruned, 0)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of masked values, so that clipping does not count them.

        Dense gradients; sparse ones, as of a table with `sparse=True`, are left as they are.
        """
        for name, pruned in self._pruned.items():
            gradient = getattr(*owner_of(self._model, name)).grad
            if gradient is not None and gradient.layout is torch.strided:
                gradient.masked_fill_(pruned, 0)

    def remove(self) -> None:
        """Let the optimizer go."""
        self._hook.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self.apply()


def hold(optimizer: Optimizer, model: nn.Module, record: SparsityRecord) -> Hold:
    """Keep the zeros of a squashed model through fine-tuning.

    After every step of `optimizer` (also one that a `GradScaler` takes) the masked values are set
    to zero again, and so is their momentum and variance, so that nothing leaks back. Zeroes once
    right away.

    Args:
        optimizer: trains the model; weights that it does not hold, such as the frozen ones beneath
            LoRA factors, are zeroed by `Hold.apply` all the same.
        model: squashed; wrapped or not, also by peft. What its parameters are may change later.
        record: what `squash` returned.

    Raises:
        MaskError: a recorded weight that the model lacks, of another shape, or still masked.

    Examples:
        >>> model, sparsifier = nn.Linear(8, 4), fxs.WeightNormSparsifier()
        >>> model = fxs.prepare(model, sparsifier, (torch.randn(1, 8),), "2:4")
        >>> sparsifier.step()
        >>> model, record = fxs.squash(model, sparsifier)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> held = fxs.hold(optimizer, model, record)
        >>> model(torch.randn(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> fxs.verify(model, record).ok
        True
    """
    pruned = {}
    for name, mask in record.items():
        owner, attribute = owner_of(model, name)
        weight = getattr(owner, attribute, None)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != mask.shape:
            found = tuple(weight.shape) if isinstance(weight, Tensor) else "nothing"
            raise MaskError(f"{name}: expected a weight of shape {mask.shape}, found {found}")
        if mask_on(owner, attribute) is not None:
            raise MaskError(f"{name} is still masked; squash first")
        pruned[name] = ~mask.keep.to(weight.device)
    return Hold(optimizer, model, pruned)
