"""What to plot of masks while a model trains."""

import torch
from torch import Tensor

from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.sparsifier.base import BaseSparsifier


class MaskScalars:
    """Three numbers about the live masks of a sparsifier, for any logger.

    Args:
        sparsifier: has prepared a model.
    """

    def __init__(self, sparsifier: BaseSparsifier) -> None:
        self._sparsifier = sparsifier
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """The numbers as they are now; each is read once, when it is wanted: it looks at all masks.

        Returns:
            `sparsity/density`: the share of elements that masks keep. `sparsity/threshold`: the
            least magnitude that a mask keeps, the mean over weights. `sparsity/churn`: the share
            of elements whose mask is another one than when this was last called; 0 at first.
        """
        total = kept = changed = 0
        thresholds: list[float] = []
        for name in self._sparsifier.names:
            mask = self._sparsifier.get_mask(name)
            keep = mask if mask.dtype == torch.bool else mask != 0
            weight = self._sparsifier.get_tensor(name)
            total, kept = total + keep.numel(), kept + int(keep.sum())
            if bool(keep.any()):
                thresholds.append(float(weight.abs().masked_fill(~keep, torch.inf).min()))
            if name in self._before:
                changed += int((unpack_bits(self._before[name], tuple(keep.shape)) != keep).sum())
            self._before[name] = pack_bits(keep)
        return {
            "sparsity/density": kept / max(total, 1),
            "sparsity/threshold": sum(thresholds) / max(len(thresholds), 1),
            "sparsity/churn": changed / max(total, 1),
        }
