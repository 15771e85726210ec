"""Masks and counters as plain data that `torch.load(weights_only=True)` reads back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_sparsity.patterns import Pattern
from fx_sparsity.sparsifier.target import Target, TensorState


class Origin(NamedTuple):
    """How a mask came about; see the attributes of `Target` of these names."""

    given: bool = False
    asked: tuple[Pattern, float] | None = None


def save_entry(target: Target, state: TensorState) -> dict[str, Any]:
    """One tensor's state: its mask and that one's origin, whether it is squashed, and counters.

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
        "given": target.given,
        "asked": None if target.asked is None else [str(target.asked[0]), target.asked[1]],
    }


def load_entry(entry: Mapping[str, Any]) -> tuple[Tensor | None, bool, dict[str, Any], Origin]:
    """Undo `save_entry`.

    Also reads an entry of `torch.ao.pruning`, whose mask is dense or COO and which has no dtype.

    Returns:
        The mask in its own dtype (None if the entry has none), whether it was squashed, counters,
        and the mask's origin, as far as it is known.
    """
    mask = entry.get("mask")
    if mask is not None:
        dense = mask.to_dense() if mask.is_sparse else mask.clone()
        mask = dense.to(getattr(torch, entry.get("mask_dtype", str(dense.dtype)[6:])))
    known = ("mask", "mask_dtype", "squashed", "given", "asked")
    asked = entry.get("asked")
    return (
        mask,
        bool(entry.get("squashed", False)),
        {key: value for key, value in entry.items() if key not in known},
        Origin(
            bool(entry.get("given", False)),
            None if asked is None else (Pattern.parse(asked[0]), asked[1]),
        ),
    )


def _as_coo(dense: Tensor) -> Tensor:
    indices = torch.empty(0, 1, dtype=torch.int64, device=dense.device)
    return torch.sparse_coo_tensor(
        indices, dense.unsqueeze(0), dense.shape, is_coalesced=True, check_invariants=False
    )
