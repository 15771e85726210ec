import pytest
import torch
from torch import nn

from fx_sparsity.sparsifier import NearlyDiagonalSparsifier


@pytest.mark.parametrize("nearliness", [-1, 0, 1, 3, 7])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
def test_a_band_is_kept(nearliness, shape):
    model = nn.Linear(shape[1], shape[0])
    sparsifier = NearlyDiagonalSparsifier(nearliness)
    sparsifier.prepare(model)
    sparsifier.step()
    ones = torch.ones(shape)
    band = ones.tril(nearliness // 2).triu(-(nearliness // 2)) if nearliness > 0 else ones * 0
    assert torch.equal(sparsifier.get_mask("weight"), band)


@pytest.mark.parametrize(
    ("nearliness", "message"), [(2, "odd number, found 2"), (13, "larger than")]
)
def test_what_is_no_band_is_refused(nearliness, message):
    model = nn.Linear(6, 6)
    sparsifier = NearlyDiagonalSparsifier(nearliness)
    sparsifier.prepare(model)
    with pytest.raises(ValueError, match=f"weight: .*{message}"):
        sparsifier.step()
    assert sparsifier.get_mask("weight").eq(1).all()
