"""A weight with its mask applied, by the operator and by torch alike, to the bit."""

import pytest
import torch

from fx_sparsity.masks import native
from fx_sparsity.sparsifier.mask import select_, selected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 9), (3, 33, 129)])
def test_masks_are_applied_as_by_where(dtype, shape):
    x = torch.randn(shape).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
    x.view(-1)[: len(special)] = special[: x.numel()]
    keep = torch.rand(shape) > 0.5
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    wanted = torch.where(keep, x, 0).view(bits)
    assert torch.equal(native.apply_mask(x, keep).view(bits), wanted)
    assert torch.equal(selected(x, keep).view(bits), wanted)
    select_(x, keep)
    assert torch.equal(x.view(bits), wanted)


def test_what_the_operator_does_not_cover_is_left_to_torch():
    keep = torch.rand(6, 4) > 0.5
    for x in (torch.randn(6, 4).double(), torch.randn(4, 6).t(), torch.randn(6, 4, device="meta")):
        assert native.apply_mask(x, keep) is None
    strided = torch.randn(4, 6).t()
    assert torch.equal(selected(strided, keep), torch.where(keep, strided, 0))
    select_(strided, keep)
    assert not strided[~keep].any()
    batch = torch.randn(3, 6, 4)
    mapped = torch.vmap(lambda x: selected(x, keep))(batch)
    assert torch.equal(mapped, torch.where(keep, batch, 0))
