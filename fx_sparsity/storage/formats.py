"""How one tensor is laid out in a file. A format is one class here and one entry in `FORMATS`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.storage.bit_packing import (
    CHUNK,
    as_integers,
    copy,
    count_bits,
    count_of_fours,
    find_bits,
    gather_blocks,
    pack,
    scatter_blocks,
    two_of_four,
    unpack,
)
from fx_sparsity.storage.container import FileFormatError
from fx_sparsity.storage.memory import empty

MOST_EXPANSION = 1024
"""No stored byte stands for more bytes than these, so that a small file cannot ask for a huge
allocation. Sparser tensors are written as bitmasks, which stay below by themselves."""

BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (32, 1), (16, 1), (8, 1), (1, 32), (1, 16), (1, 8))
"""Blocks, rows x columns, that the block format looks for."""


class Contents:
    """A tensor to be stored, and what several formats ask about it, computed once.

    Args:
        tensor: strided, on the CPU, not complex; any shape and dtype.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.shape = tuple(tensor.shape)
        self.itemsize = tensor.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return self.tensor.numel() * self.itemsize

    @cached_property
    def integers(self) -> Tensor:
        """The elements as integers, one-dimensional."""
        return as_integers(self.tensor).view(-1)

    @cached_property
    def matrix(self) -> Tensor:
        """The integers as a matrix: the last axis against all others."""
        return self.integers.view(*_matrix_shape(self.shape))

    @cached_property
    def found(self) -> tuple[Tensor, int]:
        """A bit for every element that is not all zero bits, and how many there are.

        So -0.0 counts as a value, and comes back as it was.
        """
        return find_bits(self.integers)

    @cached_property
    def full_rows(self) -> Tensor:
        """Boolean, for every index of the first axis: whether it has an element with a bit."""
        if not self.tensor.numel():
            return torch.zeros(self.shape[0], dtype=torch.bool)
        rows = self.integers.view(self.shape[0], -1)
        bits, _ = self.found
        if rows.shape[1] % 8 == 0:
            return (bits.view(len(rows), -1) != 0).any(1)
        return (rows != 0).any(1)

    @cached_property
    def best_block(self) -> tuple[tuple[int, int], int] | None:
        """The block that takes the fewest bytes, and how many of them are not empty."""
        counts = [
            (_block_bytes(self.matrix.shape, block, n, self.itemsize), block, n)
            for block, n in _blocks_in(self.found[0], self.matrix.shape)
        ]
        return min(counts)[1:] if counts else None


class Format(Protocol):
    """Stores a tensor as named parts, and reads them back bit for bit."""

    parts: Sequence[str]
    """Names of the parts; the empty one goes by the tensor's own name."""

    def size(self, contents: Contents) -> int | None:
        """Bytes that `encode` takes; None for a tensor that the format cannot hold."""

    def encode(self, contents: Contents) -> dict[str, Tensor]:
        """Part name -> contiguous tensor, for a tensor that the format can hold."""

    def check(
        self, name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor | None:
        """Make sure that `decode` gives a tensor of `shape` and `dtype`, before it is made.

        Args:
            name: of the tensor, for messages.
            parts: as in `self.parts`, none missing.
            shape: of the tensor.
            dtype: of the tensor.

        Returns:
            What had to be counted, if anything, for `decode`.

        Raises:
            FileFormatError: the parts do not fit the shape or each other.
        """

    def decode(self, parts: Mapping[str, Tensor], counted: Tensor | None, out: Tensor) -> None:
        """Undo `encode` for checked parts: writes every element of `out`, contiguous.

        Args:
            parts: as `check` had them.
            counted: what it returned.
            out: of the shape and dtype that it is given.
        """


class DenseFormat:
    """The tensor as it is."""

    parts: Sequence[str] = ("",)

    def size(self, contents: Contents) -> int:
        """See `Format.size`."""
        return contents.nbytes

    def encode(self, contents: Contents) -> dict[str, Tensor]:
        """See `Format.encode`."""
        return {"": contents.tensor.contiguous()}

    def check(
        self, name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """See `Format.check`."""
        expect_part(name, "data", parts[""], dtype, shape)

    def decode(self, parts: Mapping[str, Tensor], counted: Tensor | None, out: Tensor) -> None:
        """See `Format.decode`."""
        copy(parts[""], out)


class BitmaskFormat:
    """One bit an element, row-major and low bit first, and the values whose bit is set.

    Zeros fill the values up to a multiple of eight bytes, so that what follows is aligned.
    """

    parts: Sequence[str] = ("bitmask", "values")

    def size(self, contents: Contents) -> int:
        """See `Format.size`."""
        bits, count = contents.found
        return len(bits) + _filled(count, contents.itemsize) * contents.itemsize

    def encode(self, contents: Contents) -> dict[str, Tensor]:
        """See `Format.encode`."""
        bits, count = contents.found
        values = empty((_filled(count, contents.itemsize),), contents.integers.dtype)
        values[count:] = 0
        pack(contents.integers, bits, values[:count])
        return {"bitmask": bits, "values": values.view(contents.tensor.dtype)}

    def check(
        self, name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """See `Format.check`."""
        bits, values = parts["bitmask"], parts["values"]
        _check_bits(name, "bitmask", bits, torch.Size(shape).numel())
        counts = count_bits(bits)
        count = int(counts[-1])
        expect_part(name, "values", values, dtype, (_filled(count, dtype.itemsize),))
        if bool(as_integers(values)[count:].any()):
            _contradiction(name, "zeros after the last value", "something else")
        return counts

    def decode(self, parts: Mapping[str, Tensor], counted: Tensor | None, out: Tensor) -> None:
        """See `Format.decode`."""
        assert counted is not None
        values = as_integers(parts["values"])
        unpack(parts["bitmask"], counted, values, as_integers(out).view(-1))


class TwoFourFormat:
    """Two values of every four neighbours along the last axis, and their bits.

    The bits are those of `Bitmask`, always two of four, so that every value has its place; zeros
    stand for values where a group has fewer.
    """

    parts: Sequence[str] = ("bitmask", "values")

    def size(self, contents: Contents) -> int | None:
        """See `Format.size`."""
        if not contents.shape or contents.shape[-1] % 4 or not contents.nbytes:
            return None
        if contents.found[1] > contents.tensor.numel() // 2:
            return None
        if bool(((count_of_fours(contents.found[0]) + 0x11) & 0x44).any()):  # three or four
            return None
        return -(-contents.tensor.numel() // 8) + contents.nbytes // 2

    def encode(self, contents: Contents) -> dict[str, Tensor]:
        """See `Format.encode`."""
        bits, elements = contents.found[0], contents.tensor.numel()
        if not two_of_four(bits, elements):
            bits = _TWO_OF_FOUR[bits.int()]
            if elements % 8:
                bits[-1] &= 0x0F
        values = empty((elements // 2,), contents.integers.dtype)
        pack(contents.integers, bits, values)
        shape = (*contents.shape[:-1], contents.shape[-1] // 2)
        return {"bitmask": bits, "values": values.view(contents.tensor.dtype).view(shape)}

    def check(
        self, name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """See `Format.check`."""
        bits, elements = parts["bitmask"], torch.Size(shape).numel()
        if not shape or shape[-1] % 4:
            _contradiction(name, "a last axis that four divides", f"shape {tuple(shape)}")
        _check_bits(name, "bitmask", bits, elements)
        expect_part(name, "values", parts["values"], dtype, (*shape[:-1], shape[-1] // 2))
        if not two_of_four(bits, elements):
            _contradiction(name, "two bits of every four", "others")

    def decode(self, parts: Mapping[str, Tensor], counted: Tensor | None, out: Tensor) -> None:
        """See `Format.decode`."""
        values = as_integers(parts["values"]).view(-1)
        counts = torch.arange(0, out.numel() + CHUNK, CHUNK).clamp(max=out.numel()) // 2
        unpack(parts["bitmask"], counts, values, as_integers(out).view(-1))


class BlockFormat:
    """Block-sparse rows: the blocks that are not empty, row by row, and one bit for every block.

    The matrix is the last axis against all others. `values` is [blocks, height, width].
    """

    parts: Sequence[str] = ("blocks", "values")

    def size(self, contents: Contents) -> int | None:
        """See `Format.size`."""
        best = contents.best_block
        if best is None:
            return None
        return _block_bytes(contents.matrix.shape, *best, contents.itemsize)

    def encode(self, contents: Contents) -> dict[str, Tensor]:
        """See `Format.encode`."""
        assert contents.best_block is not None
        block, count = contents.best_block
        bits = pack_bits(_full_blocks(contents.found[0], contents.matrix.shape, block))
        values = empty((count, *block), contents.integers.dtype)
        gather_blocks(contents.matrix, bits, values)
        return {"blocks": bits, "values": values.view(contents.tensor.dtype)}

    def check(
        self, name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """See `Format.check`."""
        bits, values = parts["blocks"], parts["values"]
        rows, columns = _matrix_shape(shape)
        block = tuple(values.shape[1:])
        if values.ndim != 3 or block not in BLOCKS or rows % block[0] or columns % block[1]:
            found = f"values of shape {tuple(values.shape)}"
            _contradiction(name, f"blocks that divide {rows}x{columns}", found)
        _check_bits(name, "blocks", bits, (rows // block[0]) * (columns // block[1]))
        expect_part(name, "values", values, dtype, (int(count_bits(bits)[-1]), *block))
        _check_expansion(name, parts, shape, dtype)

    def decode(self, parts: Mapping[str, Tensor], counted: Tensor | None, out: Tensor) -> None:
        """See `Format.decode`."""
        matrix = as_integers(out).view(*_matrix_shape(out.shape))
        scatter_blocks(parts["blocks"], as_integers(parts["values"]), matrix)


class RowsFormat:
    """The rows (indices of the first axis) that are not empty, and one bit for every row.

    `remap` turns the bits into what lookups take.
    """

    parts: Sequence[str] = ("kept", "values")

    def size(self, contents: Contents) -> int | None:
        """See `Format.size`."""
        if len(contents.shape) < 2 or not contents.nbytes:
            return None
        row = contents.nbytes // contents.shape[0]
        kept = int(contents.full_rows.count_nonzero())
        return -(-contents.shape[0] // 8) + kept * row

    def encode(self, contents: Contents) -> dict[str, Tensor]:
        """See `Format.encode`."""
        values = as_integers(contents.tensor)[contents.full_rows]
        return {"kept": pack_bits(contents.full_rows), "values": values.view(contents.tensor.dtype)}

    def check(
        self, name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """See `Format.check`."""
        if len(shape) < 2 or not all(shape):
            _contradiction(name, "two axes or more, not empty", f"shape {tuple(shape)}")
        _check_bits(name, "kept", parts["kept"], shape[0])
        kept = int(count_bits(parts["kept"])[-1])
        expect_part(name, "values", parts["values"], dtype, (kept, *shape[1:]))
        _check_expansion(name, parts, shape, dtype)

    def decode(self, parts: Mapping[str, Tensor], counted: Tensor | None, out: Tensor) -> None:
        """See `Format.decode`."""
        rows = as_integers(parts["values"]).flatten(1).unsqueeze(1)
        scatter_blocks(parts["kept"], rows, as_integers(out).flatten(1))


def remap(kept: Tensor, rows: int) -> Tensor:
    """Place of every row among those that `Rows` keeps, -1 for a pruned one: int32, [rows]."""
    full = unpack_bits(kept, (rows,))
    return torch.where(full, full.cumsum(0) - 1, -1).to(torch.int32)


FORMATS: dict[str, Format] = {
    "dense": DenseFormat(),
    "two_four": TwoFourFormat(),
    "rows": RowsFormat(),
    "block": BlockFormat(),
    "bitmask": BitmaskFormat(),
}
"""Name in the file -> format, the more regular first; nothing else is ever decoded."""


def sizes(contents: Contents) -> dict[str, int]:
    """Bytes in each format that can hold a tensor, and that a reader accepts."""
    if contents.tensor.is_complex():
        return {"dense": contents.nbytes}
    found = {name: form.size(contents) for name, form in FORMATS.items()}
    return {
        name: size
        for name, size in found.items()
        if size is not None and size * MOST_EXPANSION >= contents.nbytes
    }


def smallest_format(tensor: Tensor) -> str:
    """Name of the format that stores `tensor` in the fewest bytes, the first among equals."""
    found = sizes(Contents(tensor))
    return min(found, key=lambda name: found[name])


def _filled(count: int, itemsize: int) -> int:
    """Elements that `count` values are filled up to: a multiple of eight bytes."""
    return -(-count * itemsize // 8) * 8 // itemsize


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    width = shape[-1] if shape else 1
    return torch.Size(shape[:-1]).numel(), width


def _with_two_of_four(byte: int) -> int:
    """Bits with the first unset ones of every four added up to two."""
    both = [byte & 15, byte >> 4]
    for i in range(2):
        for place in range(4):
            if both[i].bit_count() < 2:
                both[i] |= 1 << place
    return both[0] | both[1] << 4


_TWO_OF_FOUR = torch.tensor([_with_two_of_four(byte) for byte in range(256)], dtype=torch.uint8)


def _blocks_in(bits: Tensor, shape: torch.Size) -> Iterator[tuple[tuple[int, int], int]]:
    """Every block of `BLOCKS` that divides a matrix, and how many are not empty.

    Read off the bits, eight columns a byte: rows are combined pairwise, and columns by looking at
    one byte, two or four at a time.
    """
    rows, columns = shape
    if columns % 8 or not rows or not columns:
        return
    combined, height = bits.view(rows, columns // 8), 1
    while True:
        for block in BLOCKS:
            if block[0] == height and columns % block[1] == 0:
                yield block, _COUNT_OF_WIDTH[block[1]](combined)
        if height == 32 or rows % (2 * height):
            return
        combined, height = combined[0::2] | combined[1::2], 2 * height


def _full_blocks(bits: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Which blocks of a matrix have a bit that is set: boolean, [down, across]."""
    (rows, columns), (height, width) = shape, block
    combined = bits.view(rows, columns // 8)
    while len(combined) > rows // height:
        combined = combined[0::2] | combined[1::2]
    if width >= 8:
        return combined.view(_BYTES[width // 8]) != 0
    if width == 4:
        return torch.stack((combined & 15, combined >> 4), -1).flatten(1) != 0
    return unpack_bits(combined.flatten(), (rows // height, columns))


_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _count_halves(bits: Tensor) -> int:
    return int(((bits & 15) != 0).sum() + (bits > 15).sum())


def _count_whole(dtype: torch.dtype) -> Callable[[Tensor], int]:
    return lambda bits: int(bits.contiguous().view(dtype).count_nonzero())


_COUNT_OF_WIDTH: dict[int, Callable[[Tensor], int]] = {
    1: lambda bits: int(count_bits(bits.reshape(-1))[-1]),
    4: _count_halves,
    8: _count_whole(torch.uint8),
    16: _count_whole(torch.int16),
    32: _count_whole(torch.int32),
}


def _block_bytes(shape: torch.Size, block: tuple[int, int], count: int, itemsize: int) -> int:
    rows, columns = shape
    height, width = block
    blocks = (rows // height) * (columns // width)
    return -(-blocks // 8) + count * height * width * itemsize


def _check_bits(name: str, part: str, bits: Tensor, elements: int) -> None:
    expect_part(name, part, bits, torch.uint8, (-(-elements // 8),))
    if elements % 8 and int(bits[-1]) >> elements % 8:
        _contradiction(name, f"{elements} bits", "one behind the last")


def expect_part(
    name: str, part: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> None:
    """Raise `FileFormatError` unless a part of the tensor `name` has this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        expected = f"{part} of {str(dtype)[6:]} and shape {tuple(shape)}"
        _contradiction(name, expected, f"{str(tensor.dtype)[6:]}, {tuple(tensor.shape)}")


def _check_expansion(
    name: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
) -> None:
    stored = sum(part.nbytes for part in parts.values())
    wanted = torch.Size(shape).numel() * dtype.itemsize
    if wanted > MOST_EXPANSION * stored:
        _contradiction(name, f"at most {MOST_EXPANSION * stored} bytes", f"shape {tuple(shape)}")


def _contradiction(name: str, expected: str, found: str) -> NoReturn:
    raise FileFormatError(f"{name}: expected {expected}, found {found}")
