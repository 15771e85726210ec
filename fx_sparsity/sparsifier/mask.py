"""The mask parametrization: zeros a weight while the original stays trainable beneath it."""

from typing import Any

import torch
from torch import Tensor, nn

GRAPH_MASKS = "sparsity_masks"
"""Submodule of a GraphModule under which the masks of its own weights live, each by its FQN."""


class Mask(nn.Module):
    """Parametrization that keeps a weight where its mask is True, and gives +0.0 elsewhere.

    It selects instead of multiplying: `-1 * False` is -0.0 and `inf * False` is NaN. The mask is a
    persistent buffer that is edited in place, so that compiled code sees every edit without
    recompiling and a `state_dict` round trip is strict.

    Args:
        mask: of the weight's shape; boolean, or any dtype in which non-zero means keep. Held as it
            is, not copied; its dtype never changes.
    """

    mask: Tensor
    zero: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        # A constant in the graph rather than a scalar argument: only then does Inductor fold the
        # whole selection into a frozen weight. Zero-dimensional, so it never promotes the dtype.
        self.register_buffer("zero", torch.zeros((), device=mask.device), persistent=False)

    @property
    def keep(self) -> Tensor:
        """The mask as a boolean tensor."""
        return self.mask if self.mask.dtype == torch.bool else self.mask != 0

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` with zeros, in its own dtype."""
        return torch.where(self.keep, weight, self.zero)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the masked weight replaces the original as it is."""
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> "Mask":
        """Moving the module may hand out uninitialised memory (`to_empty`); zero stays zero."""
        super()._apply(fn, recurse)
        self.zero.zero_()
        return self

    def update(self, keep: Tensor) -> None:
        """Overwrite the mask in place.

        Args:
            keep: boolean, of the mask's shape.
        """
        self.mask.copy_(keep)

    def restore(self, mask: Tensor) -> None:
        """Hold what another mask holds, in its dtype: in place, or else in a new buffer.

        Args:
            mask: as `__init__` takes it; copied.
        """
        if mask is self.mask:
            return
        if (mask.dtype, mask.shape) == (self.mask.dtype, self.mask.shape):
            self.update(mask)
        else:
            self.mask = mask.detach().clone().to(self.mask.device)

    @torch.no_grad()
    def bake(self, weight: Tensor) -> None:
        """Write the zeros into `weight` itself, in place."""
        weight.masked_fill_(~self.keep, 0)


FakeSparsity = Mask
"""The name that `torch.ao.pruning` gives it."""


def masked_weights(model: nn.Module) -> list[str]:
    """FQNs of the weights that have a live mask."""
    return [
        name.removeprefix(f"{GRAPH_MASKS}.").replace("parametrizations.", "").removesuffix(".0")
        for name, module in model.named_modules()
        if isinstance(module, Mask)
    ]
