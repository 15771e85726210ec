"""Whether zeros obey a pattern."""

import torch

from fx_sparsity.masks import tiling_holds
from fx_sparsity.patterns import Tiling


def test_a_weight_smaller_than_a_block_that_may_stay_dense():
    assert tiling_holds(torch.zeros(1, 3, dtype=torch.bool), Tiling((2, 4), remainder="dense"), 0.5)
