"""The packing "bitmask": one bit a weight, and the non-zeros without gaps.

For any pattern of zeros. A weight takes 1 bit plus its density times its size: 9 bits for bf16 at
50%, 5.8 at 70%.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_sparsity.kernels import panels
from fx_sparsity.kernels.native import pack_natively, packs_natively
from fx_sparsity.kernels.panels import PackingError


class BitmaskPacking:
    """Panels of 16 outputs; for each step of a panel as many mask bits as it has elements.

    Parts:
        mask: uint8 [panels, groups, 2 * group]; bit i of a step is element i in lane-major order,
            lowest bit of the lowest byte first.
        values: [non-zeros + padding] of the weight's dtype, panel by panel and step by step; the
            padding of zeros is what a kernel may read past the end.
        offsets: int64 [panels + 1], where each panel's values begin, and where the last ends.
    """

    name = "bitmask"
    operator = "bitmask_linear.default"
    parts = ("mask", "values", "offsets")

    def refusal(self, weight: Tensor) -> str | None:
        """None: any pattern of zeros can be packed, if the weight can lie in panels."""
        return panels.refusal(weight)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Pack [out, in]; zero is what compares equal to it, so -0.0 as well."""
        if packs_natively(weight):
            weight = weight.contiguous()
            counts = torch.empty(panels.panel_count(weight.shape), dtype=torch.int64)
            torch.ops.fx_sparsity.count_panels(weight, counts)
            offsets = pad(counts.cumsum(0), (1, 0))
            return {**pack_natively(weight, offsets), "offsets": offsets}
        return self._pack_plainly(weight)

    def _pack_plainly(self, weight: Tensor) -> dict[str, Tensor]:
        """What `pack` does, in plain torch and on any device."""
        steps = panels.to_panels(weight)
        kept = steps != 0
        counts = kept.flatten(1).sum(1)
        return {
            "mask": panels.pack_bits(kept.flatten(2)),
            "values": pad(steps[kept], (0, panels.padding(weight.dtype))),
            "offsets": pad(counts.cumsum(0), (1, 0)),
        }

    def unpack(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense weight: exact where it was kept, +0.0 elsewhere."""
        kept = panels.unpack_bits(parts["mask"])
        # Where each element's value lies, or, if it has none, that of one before it.
        position = (kept.view(-1).cumsum(0) - 1).clamp(min=0).view(kept.shape)
        values = parts["values"]
        steps = torch.where(kept, values[position], values.new_zeros(()))
        return panels.from_panels(steps.unflatten(2, (panels.LANES, -1)), shape)

    def check(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise PackingError unless a kernel can read `parts` safely, as an [out, in] weight."""
        panels.expect_parts(parts, self.parts)
        count, groups = panels.panel_count(shape), panels.group_count(shape, dtype)
        group = panels.GROUP[dtype]
        mask, values, offsets = (parts[name] for name in self.parts)
        panels.expect("mask", mask, (count, groups, 2 * group), torch.uint8)
        panels.expect("offsets", offsets, (count + 1,), torch.int64)
        kept = panels.unpack_bits(mask)
        counts = kept.flatten(1).sum(1)
        if not torch.equal(offsets, pad(counts.cumsum(0), (1, 0))):
            raise PackingError("offsets do not follow from the number of bits set in the mask")
        total = int(offsets[-1])
        panels.expect("values", values, (total + panels.padding(dtype),), dtype)
        if values[total:].count_nonzero():
            raise PackingError("values do not end in zeros")
        steps = kept.unflatten(2, (panels.LANES, group))
        inside = panels.from_panels(steps, shape)
        if int(inside.count_nonzero()) != total:
            raise PackingError(f"the mask keeps elements outside of {list(shape)}")
