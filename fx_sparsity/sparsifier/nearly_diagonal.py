"""Keeps a band around the diagonal of a square-ish weight."""

from typing import Any

import torch
from torch import nn

from fx_sparsity.sparsifier.base import BaseSparsifier


class NearlyDiagonalSparsifier(BaseSparsifier):
    """Keeps the `nearliness` diagonals that are nearest to the main one.

    Args:
        nearliness: odd; 1 keeps the main diagonal alone, 3 its two neighbours too. 0 and below
            keep nothing.
    """

    def __init__(self, nearliness: int = 1) -> None:
        super().__init__({"nearliness": nearliness})

    def check_update(self, name: str) -> None:
        """Refuse what is no band of a matrix."""
        shape, nearliness = self.get_tensor(name).shape, self.config_of(name)["nearliness"]
        if nearliness <= 0:
            return
        if nearliness % 2 == 0:
            raise ValueError(f"{name}: nearliness can only be an odd number, found {nearliness}")
        if len(shape) != 2 or nearliness // 2 >= min(shape):
            raise ValueError(
                f"{name}: nearliness cannot be larger than the dimensions of tensor: "
                f"found {nearliness} for shape {tuple(shape)}"
            )

    def update_mask(  # type: ignore[override]
        self, module: nn.Module, tensor_name: str, nearliness: int, **config: Any
    ) -> None:
        """See `BaseSparsifier.update_mask`."""
        mask = self.get_mask(self.name_of(module, tensor_name))
        reach = nearliness // 2
        rows = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1)
        columns = torch.arange(mask.shape[1], device=mask.device)
        mask.copy_(((rows - columns).abs() <= reach) & (nearliness > 0))
