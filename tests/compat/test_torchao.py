import copy
import inspect
import logging

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.compat import torchao
from fx_sparsity.compat.torchao import (
    BlockSparseWeightConfig,
    SemiSparseWeightConfig,
    apply_fake_sparsity,
    block_sparse_weight,
    semi_sparse_weight,
    sparsify_,
)
from fx_sparsity.kernels import SparseLinear
from fx_sparsity.kernels.semi_structured import is_semi_structured
from fx_sparsity.lowering import LoweringError
from fx_sparsity.patterns import PatternError

# Of torchao 0.18, written down because later ones have none of it.
NAMES = {
    "sparsity": "WandaSparsifier SupermaskLinear PerChannelNormObserver apply_fake_sparsity sparsify_ "
    "semi_sparse_weight block_sparse_weight",
    "sparsity.sparse_api": "BlockSparseWeightConfig SemiSparseWeightConfig",
    "sparsity.blocksparse": "BlockSparseTensor",
    "sparsity.utils": "create_block_sparse_tensor create_semi_structured_tensor mask_creator",
    "sparsity.training": "SemiSparseLinear SemiSparseActivationLinear "
    "swap_linear_with_semi_sparse_linear swap_semi_sparse_linear_with_linear",
    "prototype.sparsity": "BaseScheduler CubicSL LambdaSL BaseSparsifier NearlyDiagonalSparsifier "
    "FakeSparsity fqn_to_module get_arg_info_from_tensor_fqn module_to_fqn WeightNormSparsifier",
    "prototype.sparsity.pruner": "BaseStructuredSparsifier FPGMPruner LSTMSaliencyPruner BiasHook "
    "FakeStructuredSparsity SaliencyPruner",
}

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


def test_no_name_is_missing_silently():
    names = {name for listed in NAMES.values() for name in listed.split()}
    assert names == {*torchao.__all__, *torchao.ABSENT}
    assert torchao.__all__ == sorted(torchao.__all__)
    for module in (fxs, fxs.sparsifier, fxs.pruning.methods):
        for name in torchao.__all__:
            assert getattr(module, name, getattr(torchao, name)) is getattr(torchao, name)


@pytest.mark.parametrize("name", torchao.ABSENT)
def test_an_absent_name_says_what_to_use(name):
    with pytest.raises(ImportError, match=rf"^fx_sparsity.compat.torchao has no {name}: \w"):
        exec(f"from fx_sparsity.compat.torchao import {name}")


def test_signatures_are_those_of_torchao():
    said = {
        call: str(inspect.signature(call)) for call in (semi_sparse_weight, block_sparse_weight)
    }
    assert said[SemiSparseWeightConfig] == "(alg_id: int = 0) -> None"
    assert said[BlockSparseWeightConfig] == "(blocksize: int = 64) -> None"
    assert list(inspect.signature(sparsify_).parameters) == ["model", "config", "filter_fn"]
    for wrong in (
        lambda: semi_sparse_weight(alg=1),
        lambda: apply_fake_sparsity(model("2:4"), fn=None),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            wrong()


def test_fake_sparsity_is_2_4_by_magnitude():
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    dense[1].weight = dense[0].weight
    before = copy.deepcopy(dense)
    assert apply_fake_sparsity(dense, filter_fn=lambda module, name: name != "2") is None
    kept = before[0].weight.abs().view(-1, 4).topk(2).values.sum()
    torch.testing.assert_close(dense[0].weight.abs().sum(), kept)
    assert dense[1].weight is dense[0].weight
    assert type(dense[0]) is nn.Linear
    assert torch.equal(dense[2].weight, before[2].weight)
    with pytest.raises(PatternError, match="weight"):
        apply_fake_sparsity(nn.Sequential(nn.Linear(6, 2)))
