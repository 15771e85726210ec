"""Small PNG files of one colour, more or less opaque: they fit a light page and a dark one."""

import base64
import struct
import zlib

from torch import Tensor

COLOR = (37, 109, 214)
LEVELS = 16


def png_uri(opacity: Tensor) -> str:
    """An image as a data URI, a pixel an element.

    Args:
        opacity: [height, width], float in [0, 1].
    """
    height, width = opacity.shape
    codes = (opacity * (LEVELS - 1)).round().byte()
    rows = b"".join(b"\0" + _packed(line) for line in codes.tolist())
    alpha = bytes(round(255 * i / (LEVELS - 1)) for i in range(LEVELS))
    parts = (
        (b"IHDR", struct.pack(">2I5B", width, height, 4, 3, 0, 0, 0)),
        (b"PLTE", bytes(COLOR) * LEVELS),
        (b"tRNS", alpha),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _packed(codes: list[int]) -> bytes:
    """Two codes of four bits a byte."""
    pairs = zip(codes[::2], [*codes[1::2], 0], strict=False)
    return bytes(high << 4 | low for high, low in pairs)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
