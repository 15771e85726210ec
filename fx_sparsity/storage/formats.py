"""How one tensor is laid out in a file. A format is one class here and one entry in `FORMATS`."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fx_sparsity.masks.bits import pack_bits, unpack_bits


class FileFormatError(ValueError):
    """A file's content does not fit what it declares; names the tensor."""


class Format(Protocol):
    """Encodes a tensor as named parts, and back."""

    def size(self, tensor: Tensor) -> int:
        """Bytes that `encode` would take."""

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Part name -> contiguous tensor; the empty name is the tensor's own."""

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int], name: str) -> Tensor:
        """Undo `encode`, bit for bit.

        Raises:
            FileFormatError: the parts do not fit `shape` or each other.
        """


class Dense:
    """The tensor as it is."""

    def size(self, tensor: Tensor) -> int:
        """See `Format.size`."""
        return tensor.numel() * tensor.element_size()

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        return {"": tensor.contiguous()}

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int], name: str) -> Tensor:
        """See `Format.decode`."""
        _expect(name, "", parts, ("",))
        if tuple(parts[""].shape) != tuple(shape):
            raise FileFormatError(
                f"{name}: expected shape {tuple(shape)}, found {tuple(parts[''].shape)}"
            )
        return parts[""]


class Bitmask:
    """One bit an element, row-major and low bit first, and the values whose bit is set.

    A value is left out only if all its bits are zero, so that -0.0 comes back as it was.
    """

    def size(self, tensor: Tensor) -> int:
        """See `Format.size`."""
        stored = int(_has_bits(tensor).sum())
        return -(-tensor.numel() // 8) + stored * tensor.element_size()

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        stored = _has_bits(tensor)
        return {"bitmask": pack_bits(stored), "values": _bits(tensor)[stored].view(tensor.dtype)}

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int], name: str) -> Tensor:
        """See `Format.decode`."""
        _expect(name, "bitmask", parts, ("bitmask", "values"))
        bits, values = parts["bitmask"], parts["values"]
        elements = torch.Size(shape).numel()
        if bits.dtype != torch.uint8 or bits.ndim != 1 or len(bits) != -(-elements // 8):
            raise FileFormatError(
                f"{name}: expected a bitmask of {-(-elements // 8)} bytes for shape "
                f"{tuple(shape)}, found {bits.dtype} of shape {tuple(bits.shape)}"
            )
        stored = unpack_bits(bits, shape)
        if values.ndim != 1 or len(values) != int(stored.sum()):
            raise FileFormatError(
                f"{name}: expected {int(stored.sum())} values, found shape {tuple(values.shape)}"
            )
        tensor = torch.zeros(tuple(shape), dtype=values.dtype)
        _bits(tensor)[stored] = _bits(values)
        return tensor


FORMATS: dict[str, Format] = {"dense": Dense(), "bitmask": Bitmask()}
"""Name in the file -> format; nothing else is ever decoded."""


def smallest_format(tensor: Tensor) -> str:
    """Name of the format that stores `tensor` in the fewest bytes, dense among equals."""
    if tensor.is_complex():
        return "dense"
    return min(FORMATS, key=lambda name: FORMATS[name].size(tensor))


def _has_bits(tensor: Tensor) -> Tensor:
    return _bits(tensor) != 0


def _bits(tensor: Tensor) -> Tensor:
    """The same elements as integers: exact, and for every dtype there are kernels for those."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integer[tensor.element_size()])


def _expect(name: str, form: str, parts: Mapping[str, Tensor], wanted: Sequence[str]) -> None:
    if set(parts) != set(wanted):
        raise FileFormatError(
            f"{name}: expected parts {sorted(wanted)} of format {form or 'dense'}, "
            f"found {sorted(parts)}"
        )
