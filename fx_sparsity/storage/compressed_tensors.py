"""Two layouts of the compressed-tensors library (as of 0.12), part for part.

A matrix `M.weight` becomes `M.shape` (int64), `M.bitmask` (uint8, [rows, ceil(columns / 8)], low
bit first, every row starting a byte) and `M.compressed`, the values. The library leaves values out
that are zero; here -0.0 counts as a value, as it may.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.storage.bit_packing import as_integers, count_bits, pack, unpack
from fx_sparsity.storage.container import FileFormatError
from fx_sparsity.storage.formats import Contents, Format, TwoFourFormat, expect_part


class SparseBitmask:
    """`sparse-bitmask`: values one-dimensional, and `row_offsets`, where each row's begin."""

    parts: Sequence[str] = ("shape", "compressed", "bitmask", "row_offsets")

    def size(self, contents: Contents) -> int | None:
        """See `Format.size`."""
        if len(contents.shape) != 2:
            return None
        rows, columns = contents.shape
        values = contents.found[1] * contents.itemsize
        return 16 + values + rows * -(-columns // 8) + 8 * rows

    def encode(self, contents: Contents) -> dict[str, Tensor]:
        """See `Format.encode`."""
        bits, count = contents.found
        values = torch.empty(count, dtype=contents.integers.dtype)
        pack(contents.integers, bits, values)
        counts = unpack_bits(bits, contents.shape).sum(1)
        return {
            "shape": torch.tensor(contents.shape),
            "compressed": values.view(contents.tensor.dtype),
            "bitmask": _by_rows(bits, contents.shape),
            "row_offsets": counts.cumsum(0) - counts,
        }

    def check(
        self, name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """See `Format.check`."""
        found = _check_bits(name, parts["bitmask"], shape)
        counts = found.sum(1)
        expect_part(name, "compressed", parts["compressed"], dtype, (int(counts.sum()),))
        expect_part(name, "row_offsets", parts["row_offsets"], torch.int64, shape[:1])
        if not torch.equal(parts["row_offsets"], counts.cumsum(0) - counts):
            raise FileFormatError(f"{name}: row_offsets do not fit the bitmask")

    def decode(self, parts: Mapping[str, Tensor], counted: Tensor | None, out: Tensor) -> None:
        """See `Format.decode`."""
        _decode(parts, out)


class Sparse24Bitmask:
    """`sparse-24-bitmask`: two values of every four neighbours, so that they form a matrix."""

    parts: Sequence[str] = ("shape", "compressed", "bitmask")

    def size(self, contents: Contents) -> int | None:
        """See `Format.size`."""
        if len(contents.shape) != 2 or TwoFourFormat().size(contents) is None:
            return None
        rows, columns = contents.shape
        return 16 + contents.nbytes // 2 + rows * -(-columns // 8)

    def encode(self, contents: Contents) -> dict[str, Tensor]:
        """See `Format.encode`."""
        parts = TwoFourFormat().encode(contents)
        return {
            "shape": torch.tensor(contents.shape).view(-1, 1),
            "compressed": parts["values"],
            "bitmask": _by_rows(parts["bitmask"], contents.shape),
        }

    def check(
        self, name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """See `Format.check`."""
        found = _check_bits(name, parts["bitmask"], shape)
        rows, columns = shape
        if columns % 4 or bool((found.reshape(-1, 4).sum(1) != 2).any()):
            raise FileFormatError(f"{name}: expected two bits of every four")
        expect_part(name, "compressed", parts["compressed"], dtype, (rows, columns // 2))

    def decode(self, parts: Mapping[str, Tensor], counted: Tensor | None, out: Tensor) -> None:
        """See `Format.decode`."""
        _decode(parts, out)


OUTSIDE: dict[str, Format] = {
    "sparse-bitmask": SparseBitmask(),
    "sparse-24-bitmask": Sparse24Bitmask(),
}
"""Name of the layout -> what it makes of a matrix. The first has all the parts of the second."""


def outside_name(name: str, part: str) -> str:
    """What a part of the matrix `name`, which ends in `.weight`, is called."""
    return f"{name.removesuffix('.weight')}.{part}"


def _by_rows(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Bits of a matrix with every row starting a byte."""
    rows, columns = shape
    if columns % 8 == 0:
        return bits.view(rows, columns // 8)
    found = torch.nn.functional.pad(unpack_bits(bits, shape), (0, -columns % 8))
    return pack_bits(found).view(rows, -(-columns // 8))


def _check_bits(name: str, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bits of a matrix as booleans, once it is sure that they fit."""
    if len(shape) != 2:
        raise FileFormatError(f"{name}: expected a matrix, found shape {tuple(shape)}")
    rows, columns = shape
    expect_part(name, "bitmask", bits, torch.uint8, (rows, -(-columns // 8)))
    found = unpack_bits(bits.flatten(), (rows, 8 * bits.shape[1]))
    if bool(found[:, columns:].any()):
        raise FileFormatError(f"{name}: expected {columns} bits a row, found one behind the last")
    return found[:, :columns]


def _decode(parts: Mapping[str, Tensor], out: Tensor) -> None:
    bits, columns = parts["bitmask"], out.shape[1]
    if columns % 8:
        found = unpack_bits(bits.flatten(), (len(bits), 8 * bits.shape[1]))[:, :columns]
        bits = pack_bits(found)
    bits, values = bits.flatten(), as_integers(parts["compressed"]).flatten()
    unpack(bits, count_bits(bits), values, as_integers(out).flatten())
