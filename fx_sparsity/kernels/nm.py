"""The packing "nm": weights of which every group of M neighbouring inputs keeps at most N.

Every group has N values, zeros among them if it has fewer, so that no offsets are needed. 2:4 and
4:8 in bf16 take 9 bits a weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.kernels import panels
from fx_sparsity.kernels.native import pack_natively, packs_natively
from fx_sparsity.kernels.panels import LANES, PackingError

PATTERNS = ((1, 4), (2, 8), (2, 4), (4, 8))
"""N and M of the patterns that are packed, what stores less first; others are for bitmask."""


class NMPacking:
    """Panels of 16 outputs as in bitmask, with the same number of values in each.

    Parts:
        mask: uint8 [panels, groups, 2 * group], one bit an element as in bitmask.
        values: [panels * values of a panel + padding] of the weight's dtype, panel by panel and
            step by step; the padding of zeros is what a kernel may read past the end.
    """

    name = "nm"
    operator = "nm_linear.default"
    parts = ("mask", "values")

    def refusal(self, weight: Tensor) -> str | None:
        """Why the weight follows none of `PATTERNS`; None if it follows one."""
        if reason := panels.refusal(weight):
            return reason
        if _pattern(weight) is None:
            known = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
            return f"its zeros follow none of {known} along the inputs; bitmask takes any zeros"
        return None

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Pack [out, in] that is not refused; zero is what compares equal to it."""
        pattern = _pattern(weight)
        if pattern is None:
            raise PackingError(f"{self.name}: {self.refusal(weight)}")
        if packs_natively(weight):
            n, m = pattern
            count = panels.panel_count(weight.shape)
            size = LANES * panels.ceil_div(weight.shape[1], m) * n
            return pack_natively(weight.contiguous(), torch.arange(count + 1) * size, pattern)
        return self._pack_plainly(weight, *pattern)

    def _pack_plainly(self, weight: Tensor, n: int, m: int) -> dict[str, Tensor]:
        """What `pack` does, in plain torch and on any device."""
        groups = panels.group_count(weight.shape, weight.dtype)
        full = pad(weight, (0, -weight.shape[1] % m, 0, -weight.shape[0] % LANES))
        full = torch.where(full != 0, full, full.new_zeros(()))
        # The non-zeros of a group, then as many of its zeros as are needed, in their order.
        order = (full.unflatten(1, (-1, m)) == 0).to(torch.uint8).argsort(stable=True, dim=-1)
        kept = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :n], True)
        steps = panels.to_panels(full)
        kept = panels.to_panels(kept.flatten(1).to(weight.dtype)) != 0
        return {
            "mask": panels.pack_bits(kept.flatten(2))[:, :groups].contiguous(),
            "values": pad(steps[kept], (0, panels.padding(weight.dtype))),
        }

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense weight: exact where it was kept, +0.0 elsewhere."""
        kept, values = panels.unpack_bits(parts["mask"]), parts["values"]
        count = kept.shape[0]
        size = (values.shape[0] - panels.padding(dtype)) // count
        first = torch.arange(count, device=kept.device).unsqueeze(1) * size
        position = (kept.flatten(1).cumsum(1) - 1).clamp(min=0) + first
        steps = torch.where(kept, values[position.view(kept.shape)], values.new_zeros(()))
        return panels.from_panels(steps.unflatten(2, (LANES, -1)), shape)

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError unless a kernel can read `parts` safely, as an [out, in] weight."""
        panels.expect_parts(parts, self.parts)
        mask, values = (parts[name] for name in self.parts)
        count, groups = panels.panel_count(shape), panels.group_count(shape, dtype)
        panels.expect("mask", mask, (count, groups, 2 * panels.GROUP[dtype]), torch.uint8)
        total = values.numel() - panels.padding(dtype)
        if total < 0 or total % count:
            raise PackingError(f"values are {values.numel()}, which {count} panels cannot share")
        panels.expect("values", values, (total + panels.padding(dtype),), dtype)
        if values[total:].count_nonzero():
            raise PackingError("values do not end in zeros")
        kept = panels.unpack_bits(mask).flatten(1).sum(1)
        if bool((kept > total // count).any()):
            panel = int((kept > total // count).nonzero()[0])
            raise PackingError(
                f"the mask keeps {int(kept[panel])} elements of panel {panel}, "
                f"which has {total // count} values"
            )
        inside = self.unpack(parts, shape, dtype).count_nonzero()
        if int(inside) != int(values.count_nonzero()):
            raise PackingError(f"values are kept outside of {list(shape)}, or not at all")


def _pattern(weight: Tensor) -> tuple[int, int] | None:
    """The first of `PATTERNS` that the zeros follow."""
    if packs_natively(weight):
        dense = weight.contiguous()
        most = {m: torch.ops.fx_sparsity.most_of(dense, m) for m in {m for _, m in PATTERNS}}
        return next(((n, m) for n, m in PATTERNS if most[m] <= n), None)
    for n, m in PATTERNS:
        groups = pad(weight, (0, -weight.shape[1] % m)).unflatten(1, (-1, m))
        if int((groups != 0).sum(-1).amax()) <= n:
            return n, m
    return None
