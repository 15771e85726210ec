import copy
import logging

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.compat.torchao import BlockSparseWeightConfig
from fx_sparsity.kernels import SparseLinear
from fx_sparsity.kernels.semi_structured import is_semi_structured
from fx_sparsity.lowering import LoweringError

X = torch.randn(3, 64)


def model(pattern):
    torch.manual_seed(0)
    made, sparsifier = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(),
        fxs.WeightNormSparsifier(),
    )
    fxs.prepare(made, sparsifier, (X,), fxs.SparsityMapping().set_global(pattern))
    sparsifier.step()
    return fxs.squash(made, sparsifier)[0]


@pytest.mark.parametrize(
    ("pattern", "config"),
    [
        ("2:4", fxs.SemiSparseWeightConfig()),
        ("block:32x32 50%", BlockSparseWeightConfig(blocksize=32)),
    ],
)
@torch.no_grad()
def test_without_cuda_it_packs_and_says_why(pattern, config, caplog):
    sparse = model(pattern)
    expected = sparse(X)
    with caplog.at_level(logging.WARNING):
        done = fxs.sparsify_(sparse, config, lambda module, name: name == "0")
    assert isinstance(done[0], SparseLinear)
    assert isinstance(done[2], nn.Linear)
    torch.testing.assert_close(done(X), expected)
    assert "0: torch has" in caplog.text
    assert "on CUDA alone, the weight is on cpu; packed as" in caplog.text


def test_what_has_no_kernel_stays_dense_and_says_why(caplog):
    sparse = model("2:4").half()
    fxs.sparsify_(sparse, fxs.SemiSparseWeightConfig())
    assert isinstance(sparse[0], nn.Linear)
    assert (
        "0: torch has semi-structured kernels on CUDA alone, the weight is on cpu; it stays dense"
        in caplog.text
    )


def test_a_dense_weight_is_refused_by_name():
    dense = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(LoweringError, match="0.weight: expected two zeros among every four"):
        fxs.sparsify_(dense, fxs.SemiSparseWeightConfig())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_on_cuda_torch_has_the_kernels():
    sparse = model("2:4").half().cuda()
    x = X.half().cuda()
    expected, weight = sparse(x), sparse[0].weight.clone()
    done = fxs.sparsify_(copy.deepcopy(sparse), fxs.SemiSparseWeightConfig())
    assert is_semi_structured(done[0].weight)
    torch.testing.assert_close(done(x), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(fxs.unlower(done)[0].weight, weight)
