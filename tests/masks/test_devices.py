"""On an accelerator the host never waits: meta tensors have no values that it could wait for."""

import pytest
import torch

from fx_sparsity.masks import Rank, compute_mask
from fx_sparsity.masks.native import Geometry, geometry
from fx_sparsity.patterns import Tiling


@pytest.mark.parametrize("rank", [Rank.MAGNITUDE, Rank.SQUARE])
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling((1, 1)),
        Tiling((1, 4), remainder="pad"),
        Tiling((8, 8), remainder="pad"),
        Tiling((1, 4), 2, "pad"),
        Tiling((1, 4), "level", "dense"),
        Tiling((1, 66), "level"),
        Tiling((1, 66)),
    ],
)
def test_no_host_synchronisation(tiling, rank):
    x = torch.empty(64, 66, device="meta")
    out = torch.empty(64, 66, device="meta")
    assert compute_mask(x, tiling, 0.5, rank, out=out, checked=True) is out
    with pytest.raises((RuntimeError, NotImplementedError)):  # such a wait would have been seen
        bool(out.any())


@pytest.mark.parametrize(
    ("shape", "extents", "expected"),
    [
        ((6,), (2,), (1, 1, 6, 1, 2)),
        ((5, 6), (1, 6), (1, 1, 30, 1, 6)),
        ((5, 6, 3, 3), (1, 4, 1, 1), (5, 6, 9, 4, 1)),
        ((5, 6, 3, 3), (1, 6, 3, 3), (1, 1, 270, 1, 54)),
        ((5, 6, 3, 3), (5, 1, 3, 3), (1, 5, 54, 5, 9)),
        ((2, 5, 6), (1, 4, 4), (2, 5, 6, 4, 4)),
        ((5, 6, 3, 3), (4, 4, 1, 1), None),
    ],
)
def test_dimensions_that_merge(shape, extents, expected):
    found = geometry(shape, Tiling(extents, remainder="pad"))
    assert found == (None if expected is None else Geometry(*expected, dense=False))
