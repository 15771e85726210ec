import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fx_sparsity import Mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, None])
def test_masked_is_positive_zero_whatever_stood_there(dtype, mask_dtype):
    weight = torch.tensor([-1.0, float("inf"), float("nan"), -0.0, 3.0], dtype=dtype)
    mask = torch.tensor([0, 0, 0, 0, 1], dtype=mask_dtype or dtype)
    masked = Mask(mask)(weight)
    assert masked.dtype == dtype
    assert masked.tolist() == [0, 0, 0, 0, 3]
    assert not torch.signbit(masked).any()


def linear(mask_dtype=torch.bool):
    module = nn.Linear(4, 3)
    mask = Mask(torch.ones(3, 4, dtype=mask_dtype))
    parametrize.register_parametrization(module, "weight", mask)
    return module, mask


def test_state_dict_round_trip_is_strict():
    module, mask = linear()
    mask.mask[0] = False
    other, _ = linear()
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other.weight, module.weight)


def test_deepcopy_half_and_gradients():
    module, mask = linear(torch.float32)
    mask.mask[0] = 0
    copied = copy.deepcopy(module)
    assert torch.equal(copied.weight, module.weight)
    module.half()
    assert module.weight.dtype == torch.float16
    module.float()(torch.ones(2, 4)).sum().backward()
    gradient = module.parametrizations.weight.original.grad
    assert gradient[0].eq(0).all()
    assert gradient[1:].ne(0).all()


def test_compiled_code_sees_edits_without_recompiling():
    module, mask = linear()
    x = torch.randn(2, 4)
    compiled = torch.compile(module, fullgraph=True)
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        mask.mask.zero_()
        torch.testing.assert_close(compiled(x), module.bias.expand(2, 3))


def test_export_carries_the_mask():
    module, mask = linear()
    mask.mask[:, :2] = False
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def test_bake_writes_in_place():
    weight = torch.tensor([-1.0, 2.0])
    Mask(torch.tensor([False, True])).bake(weight)
    assert weight.tolist() == [0, 2]
    assert not torch.signbit(weight).any()
