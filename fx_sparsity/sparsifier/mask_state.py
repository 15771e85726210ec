"""Masks and counters as plain data that `torch.load(weights_only=True)` reads back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fx_sparsity.sparsifier.target import Target, TensorState


def save_entry(target: Target, state: TensorState) -> dict[str, Any]:
    """One tensor's state: its mask, the mask's dtype, whether it is squashed, and counters.

    A mask of zeros and ones is kept as booleans, a byte an element whatever its dtype. It is a
    sparse COO tensor without sparse dimensions, so that code which calls `.to_dense()` on the masks
    of a `torch.ao.pruning` state reads this one too.
    """
    mask = target.mask.mask.detach()
    binary = mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())
    return {
        **state.counters,
        "mask": _as_coo(mask.bool() if binary else mask.clone()),
        "mask_dtype": str(mask.dtype).removeprefix("torch."),
        "squashed": target.squashed,
    }


def load_entry(entry: Mapping[str, Any]) -> tuple[Tensor | None, bool, dict[str, Any]]:
    """Undo `save_entry`.

    Also reads an entry of `torch.ao.pruning`, whose mask is dense or COO and which has no dtype.

    Returns:
        The mask in its own dtype (None if the entry has none), whether it was squashed, counters.
    """
    mask = entry.get("mask")
    if mask is not None:
        dense = mask.to_dense() if mask.is_sparse else mask.clone()
        mask = dense.to(getattr(torch, entry.get("mask_dtype", str(dense.dtype)[6:])))
    known = ("mask", "mask_dtype", "squashed")
    return (
        mask,
        bool(entry.get("squashed", False)),
        {key: value for key, value in entry.items() if key not in known},
    )


def _as_coo(dense: Tensor) -> Tensor:
    indices = torch.empty(0, 1, dtype=torch.int64, device=dense.device)
    return torch.sparse_coo_tensor(
        indices, dense.unsqueeze(0), dense.shape, is_coalesced=True, check_invariants=False
    )
