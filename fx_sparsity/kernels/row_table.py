"""Tables of embeddings without their pruned rows: the kept rows, and a remap from index to row."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fx_sparsity.kernels.panels import PackingError

CODE_DTYPES = {8: torch.int8, 4: torch.uint8}
"""Bits of a code -> dtype of the rows that hold such codes; 4-bit codes lie two a byte."""

_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class RowTable:
    """A table of [remap.numel(), columns] of which only some rows are stored.

    Attributes:
        rows: the kept ones. float32 or bfloat16 [kept, columns]; int8 [kept, columns], codes; or
            uint8 [kept, ceil(columns / 2)], 4-bit codes from 0 to 15, two a byte, the first one in
            the lower half.
        affine: float32 [kept, 2], the scale and the zero point of each row of codes, which mean
            `(code - zero_point) * scale`; None for floats.
        remap: int32, one an index: its row, or -1 if that was pruned.
        columns: values in a row.
    """

    rows: Tensor
    affine: Tensor | None
    remap: Tensor
    columns: int

    @classmethod
    def from_weight(cls, weight: Tensor, bits: int | None = None) -> Self:
        """Leave out the rows of `weight`, [rows, columns], that hold nothing but zeros.

        Args:
            weight: float32 or bfloat16; -0.0 counts as zero.
            bits: 8 or 4 to store codes, each row from its least to its largest value; None to store
                the values as they are.

        Raises:
            TypeError: another dtype.
            ValueError: the weight is not a matrix, `bits` is something else, or a row that is to be
                quantized is not finite.
        """
        if weight.dtype not in _FLOATS:
            raise TypeError(f"expected a weight of float32 or bfloat16, found {weight.dtype}")
        _expect_matrix("weight", weight)
        weight = weight.detach()
        kept = (weight != 0).any(1)
        rows, remap = weight[kept], _remap(kept)
        if bits is None:
            return cls(rows, None, remap, weight.shape[1])
        _expect_bits(bits)
        if not bool(rows.isfinite().all()):
            row = int((~weight.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"expected finite values to quantize, found others in row {row}")
        return cls(*_quantize(rows.float(), bits), remap, weight.shape[1])

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Self:
        """Leave out the rows in which every code means zero.

        Args:
            codes: [rows, columns], uint8 or int8, not packed; with 4 bits from 0 to 15 or from -8
                to 7.
            scale: [rows] or [rows, 1].
            zero_point: like `scale`; of any real dtype, it may have a fraction.
            bits: of a code: 8 or 4.

        Raises:
            TypeError: codes of another dtype.
            ValueError: shapes that do not fit, codes of more bits, or parameters that are not
                finite.
        """
        if codes.dtype not in (torch.uint8, torch.int8):
            raise TypeError(f"expected codes of uint8 or int8, found {codes.dtype}")
        _expect_matrix("codes", codes)
        _expect_bits(bits)
        for name, values in (("scale", scale), ("zero_point", zero_point)):
            if values.shape not in ((len(codes),), (len(codes), 1)):
                raise ValueError(
                    f"expected a {name} for each of {len(codes)} rows, found {list(values.shape)}"
                )
        affine = torch.stack([scale.detach().reshape(-1), zero_point.detach().reshape(-1)], 1)
        affine = affine.float()
        if not bool(affine.isfinite().all()):
            row = int((~affine.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"expected a finite scale and zero point, found others in row {row}")
        # Codes are shifted into the range in which they are stored.
        shift = {(8, torch.uint8): -128, (4, torch.int8): 8}.get((bits, codes.dtype), 0)
        least, most = (0, 15) if bits == 4 else (-128, 127)
        kept = ((codes != affine[:, 1:]) & (affine[:, :1] != 0)).any(1)
        rows = codes[kept].to(torch.int16) + shift
        if rows.numel() and not least <= int(rows.min()) <= int(rows.max()) <= most:
            raise ValueError(f"expected codes of {bits} bits, found others")
        affine = affine[kept] + affine.new_tensor([0, shift])
        return cls(_store(rows, bits), affine, _remap(kept), codes.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(x.nbytes for x in (self.rows, self.affine, self.remap) if x is not None)

    def check(self) -> None:
        """Raise unless the operators can read the table.

        Raises:
            PackingError: names the part that is corrupt, and how.
        """
        if self.rows.dtype not in (*_FLOATS, *CODE_DTYPES.values()):
            raise PackingError(f"rows are {self.rows.dtype}, expected one that a table can hold")
        coded = self.rows.dtype in CODE_DTYPES.values()
        width = (self.columns + 1) // 2 if self.rows.dtype == CODE_DTYPES[4] else self.columns
        if self.rows.ndim != 2 or self.rows.shape[1] != width:
            raise PackingError(f"rows have shape {list(self.rows.shape)}, expected [kept, {width}]")
        kept = len(self.rows)
        if (self.affine is not None) != coded:
            raise PackingError(f"rows of {self.rows.dtype} and affine do not belong together")
        if self.affine is not None:
            if self.affine.dtype != torch.float32 or self.affine.shape != (kept, 2):
                raise PackingError(
                    f"affine is {self.affine.dtype} {list(self.affine.shape)}, "
                    f"expected torch.float32 [{kept}, 2]"
                )
            if not bool(self.affine.isfinite().all()):
                raise PackingError("affine holds a scale or zero point that is not finite")
        if self.remap.dtype != torch.int32 or self.remap.ndim != 1:
            raise PackingError(
                f"remap is {self.remap.dtype} {list(self.remap.shape)}, expected torch.int32 [rows]"
            )
        outside = (self.remap < -1) | (self.remap >= kept)
        if bool(outside.any()):
            index = int(outside.nonzero()[0])
            raise PackingError(
                f"remap sends index {index} to row {int(self.remap[index])}, "
                f"of {kept} rows and -1 for a pruned one"
            )
        for name, part in (("rows", self.rows), ("affine", self.affine), ("remap", self.remap)):
            if part is not None and not part.is_contiguous():
                raise PackingError(f"{name} is not contiguous")
            if part is not None and part.device != self.remap.device:
                raise PackingError(f"{name} is on {part.device}, remap on {self.remap.device}")

    def look_up(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of `indices`, [*indices.shape, columns], in plain torch; pruned ones are +0.0."""
        row = self.remap[indices]
        kept = row >= 0
        if not len(self.rows):
            return self.rows.new_zeros((*indices.shape, self.columns), dtype=dtype)
        row = row.clamp(min=0)
        values = self.rows[row]
        if self.rows.dtype == CODE_DTYPES[4]:
            values = torch.stack([values & 15, values >> 4], -1).flatten(-2)[..., : self.columns]
        if self.affine is not None:
            scale, zero_point = self.affine[row].split(1, -1)
            values = (values - zero_point) * scale
        return torch.where(kept.unsqueeze(-1), values, 0).to(dtype)


def _quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and affine parameters of fp32 rows; a row of one value is exact."""
    levels = 2**bits - 1
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    spread = (high / levels - low / levels).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(high > low, spread, low)
    codes = ((rows - low) / scale).round_().clamp_(0, levels)
    least = -128 if bits == 8 else 0
    zero_point = least - low / scale
    return _store(codes.to(torch.int16) + least, bits), torch.cat([scale, zero_point], 1)


def _store(codes: Tensor, bits: int) -> Tensor:
    """Codes of int16, in range, as the rows of a table."""
    if bits == 8:
        return codes.to(torch.int8)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _remap(kept: Tensor) -> Tensor:
    return torch.where(kept, kept.cumsum(0) - 1, -1).to(torch.int32)


def _expect_matrix(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2 or not tensor.shape[1]:
        raise ValueError(f"expected a {name} of [rows, columns], found {list(tensor.shape)}")


def _expect_bits(bits: int) -> None:
    if bits not in CODE_DTYPES:
        raise ValueError(f"expected 8 or 4 bits, found {bits}")
