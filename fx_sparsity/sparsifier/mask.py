"""The mask parametrization: zeros a weight while the original stays trainable beneath it."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.masks import native
from fx_sparsity.masks.bits import pack_mask, unpack_bits
from fx_sparsity.sparsifier.lost_writes import LostWrites

GRAPH_MASKS = "sparsity_masks"
"""Submodule of a GraphModule under which the masks of its own weights live, each by its FQN."""
_EXPORTED = re.compile(rf"{GRAPH_MASKS}\..+|(.+\.)?parametrizations\.\w+\.0")
"""Where the buffer of a mask lies in what was exported, which keeps names and no classes."""


def selected(weight: Tensor, keep: Tensor, zero: Tensor | float = 0) -> Tensor:
    """`torch.where(keep, weight, zero)`, by our own operator where it can."""
    if not torch.compiler.is_compiling() and (fast := native.apply_mask(weight, keep)) is not None:
        return fast
    return torch.where(keep, weight, zero)


def select_(tensor: Tensor, keep: Tensor) -> None:
    """Write zeros into `tensor` where `keep` is False; outside of autograd and of compiled code."""
    if native.apply_mask(tensor, keep, in_place=True) is None:
        tensor.masked_fill_(~keep, 0)


class _Select(torch.autograd.Function):
    """`torch.where(keep, weight, zero)`, whose backward takes sparse gradients, too.

    Those of embedding tables with `sparse=True` stay sparse.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, keep: Tensor, zero: Tensor) -> Tensor:
        return selected(weight, keep, zero)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])  # so that an edit of the mask before backward is noticed
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ((keep,), (grad,)) = ctx.saved_tensors, grads
        if grad.layout is not torch.sparse_coo:
            return selected(grad, keep), None, None
        grad = grad.coalesce()
        indices = grad.indices()
        values = torch.where(keep[indices.unbind()], grad.values(), 0)
        return torch.sparse_coo_tensor(indices, values, grad.shape, is_coalesced=True), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, tangents[0], 0)


class Mask(nn.Module):
    """Parametrization that keeps a weight where its mask is True, and gives +0.0 elsewhere.

    It selects instead of multiplying: `-1 * False` is -0.0 and `inf * False` is NaN. The mask is a
    persistent buffer that is edited in place, so that compiled code sees every edit without
    recompiling and a `state_dict` round trip is strict.

    What it gives out is computed anew at each access, so that a write in place into the weight, as
    by `nn.init`, is lost. There is a warning at the next access, or when the mask is updated or
    baked in. Assigning to the weight, and writing to the original beneath, take effect.

    Args:
        mask: of the weight's shape; boolean, or any dtype in which non-zero means keep. Held as it
            is, not copied; its dtype never changes.
    """

    mask: Tensor
    zero: Tensor
    name = "a masked weight"
    """For messages."""
    watches = True
    """Whether lost writes are told."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        # A constant in the graph rather than a scalar argument: only then does Inductor fold the
        # whole selection into a frozen weight. Zero-dimensional, so it never promotes the dtype.
        self.register_buffer("zero", torch.zeros((), device=mask.device), persistent=False)
        self._writes = LostWrites()

    @property
    def keep(self) -> Tensor:
        """The mask as a boolean tensor."""
        return self.mask if self.mask.dtype == torch.bool else self.mask != 0

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` with zeros, in its own dtype."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return torch.where(self.keep, weight, self.zero)
        self._tell_lost_writes()
        if torch.is_grad_enabled() and weight.requires_grad:
            masked: Tensor = _Select.apply(weight, self.keep, self.zero)
        else:
            masked = torch.where(self.keep, weight, self.zero)
        if self.watches:
            self._writes.give(masked)
        return masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the masked weight replaces the original as it is."""
        self._writes.take()  # as of `layer.weight += 1`, which assigns what it wrote into
        return weight

    def _tell_lost_writes(self) -> None:
        if self._writes.take():
            warnings.warn(
                f"{self.name}: something wrote in place into what its mask gives out, which is "
                "lost; write to the original beneath (parametrizations.weight.original), or "
                "assign to the weight",
                stacklevel=3,
            )

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

    def saved(self) -> Callable[[], None]:
        """What puts the mask back as it is now; takes an eighth of a byte an element.

        A mask of other values than zeros and ones is kept as it is.
        """
        self._tell_lost_writes()  # a new mask is on its way
        packed, shape = pack_mask(self.mask), self.mask.shape
        if packed is not None:
            return lambda: self.update(unpack_bits(packed, shape))
        held = self.mask.clone()
        return lambda: self.update(held)

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
        self._tell_lost_writes()
        weight.masked_fill_(~self.keep, 0)


FakeSparsity = Mask
"""The name that `torch.ao.pruning` gives it."""


def masked_weights(model: nn.Module) -> list[str]:
    """FQNs of the weights that have a live mask; those of what was exported with it, too."""
    return [
        name.removeprefix(f"{GRAPH_MASKS}.").replace("parametrizations.", "").removesuffix(".0")
        for name, module in model.named_modules()
        if isinstance(module, Mask) or ("mask" in module._buffers and _EXPORTED.fullmatch(name))
    ]
