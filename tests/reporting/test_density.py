import base64
import struct
import zlib

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from fx_sparsity.reporting import density_of
from fx_sparsity.reporting.png import png_uri


@pytest.mark.parametrize("shape", [(96, 48), (24, 240), (7, 5), (1, 3)])
def test_the_overview_has_the_means_of_cells(shape):
    zero = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = density_of(zero)
    cells = [min(24, size) for size in shape]
    expected = adaptive_avg_pool2d((~zero).float()[None], cells)[0]
    torch.testing.assert_close(found.overview, expected)
    assert torch.equal(found.corner, ~zero[:32, :32])
    assert found.zeros == pytest.approx(zero.float().mean().item())


@pytest.mark.parametrize("shape", [(100, 70), (31, 53)])
def test_cells_that_do_not_divide_the_weight_cover_it_once(shape):
    zero = torch.ones(shape, dtype=torch.bool)
    zero[-1, -1] = False
    found = density_of(zero).overview
    assert found.count_nonzero() == 1
    rows, columns = (size - size * 23 // 24 for size in shape)
    assert found[-1, -1] == pytest.approx(1 / (rows * columns))


def test_other_shapes_become_matrices():
    assert density_of(torch.zeros(8, 4, 3, 3, dtype=torch.bool)).corner.shape == (8, 32)
    experts = density_of(torch.zeros(4, 8, 6, dtype=torch.bool), ("batch", "out", "in"))
    assert experts.corner.shape == (32, 6)
    assert density_of(torch.tensor(True)).zeros == 1


def test_pixels_are_as_opaque_as_they_are_dense():
    opacity = torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.0, 1.0]])
    data = base64.b64decode(png_uri(opacity).partition(",")[2])
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, rest = {}, data[8:]
    while rest:
        (size,), kind = struct.unpack(">I", rest[:4]), rest[4:8]
        chunks[kind], (crc,) = rest[8 : 8 + size], struct.unpack(">I", rest[8 + size : 12 + size])
        assert crc == zlib.crc32(kind + chunks[kind])
        rest = rest[12 + size :]
    width, height, depth, color = struct.unpack(">2I2B", chunks[b"IHDR"][:10])
    assert (width, height, depth, color) == (3, 2, 4, 3)
    lines = zlib.decompress(chunks[b"IDAT"])
    codes = [[line[1] >> 4, line[1] & 15, line[2] >> 4] for line in (lines[:3], lines[3:])]
    alpha = torch.tensor([[chunks[b"tRNS"][code] / 255 for code in row] for row in codes])
    torch.testing.assert_close(alpha, opacity, atol=0.51 / 15, rtol=0)
