"""A mask through which gradients reach more than what it keeps."""

from typing import Any

import torch
from torch import Tensor

from fx_sparsity.sparsifier import Mask
from fx_sparsity.sparsifier.mask import selected


class _Through(torch.autograd.Function):
    """`torch.where(keep, weight, zero)`; the gradient passes where `keep` or `through` is True.

    Without a `jvp`, which Dynamo does not compile.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, keep: Tensor, through: Tensor, zero: Tensor) -> Tensor:
        return selected(weight, keep, zero)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])  # edits of them before backward are noticed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        keep, through = ctx.saved_tensors
        return selected(grads[0], keep | through), None, None, None


class ThroughMask(Mask):
    """A mask whose backward may let gradients reach weights that it does not keep.

    The buffer `through` says which: one boolean for the whole weight, or one an element. It is
    edited in place, like the mask, so that compiled code sees every edit without recompiling. It
    is no part of the state: the method that owns the mask knows what it has to be.

    Args:
        mask: see `Mask`.
        wide: whether `through` has an element for each of the mask's, rather than one for all.
    """

    through: Tensor

    def __init__(self, mask: Tensor, wide: bool = False) -> None:
        super().__init__(mask)
        shape = mask.shape if wide else ()
        through = torch.zeros(shape, dtype=torch.bool, device=mask.device)
        self.register_buffer("through", through, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """See `Mask.forward`."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return super().forward(weight)
        if torch.compiler.is_compiling():
            return _Through.apply(weight, self.keep, self.through, self.zero)
        self._tell_lost_writes()
        masked: Tensor = _Through.apply(weight, self.keep, self.through, self.zero)
        if self.watches:
            self._writes.give(masked)
        return masked
