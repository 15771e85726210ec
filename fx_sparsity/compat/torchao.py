"""`sparsify_`, for those who come from torchao: sparse kernels for weights that are sparse."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fx_sparsity.kernels.packings import PACKINGS
from fx_sparsity.kernels.semi_structured import (
    follows_2_4,
    put_semi_structured,
    semi_structured_refusal,
)
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lower import lower
from fx_sparsity.lowering.policy import LoweringError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SemiSparseWeightConfig:
    """2:4 weights: torch's semi-structured tensors on CUDA, packing `"nm"` elsewhere."""

    packings: ClassVar = ("nm", "bitmask")

    def refusal(self, weight: Tensor) -> str | None:
        """Why torch has no kernel for a weight; None if it has."""
        return semi_structured_refusal(weight)

    def put(self, module: nn.Linear) -> None:
        """Give a layer torch's kernel."""
        put_semi_structured(module)


@dataclass(frozen=True)
class BlockSparseWeightConfig:
    """Weights of zero blocks: torch's BSR tensors on CUDA, packing `"block"` elsewhere.

    Attributes:
        blocksize: rows and columns of a block.
    """

    blocksize: int = 64
    packings: ClassVar = ("block", "bitmask")

    def refusal(self, weight: Tensor) -> str | None:
        """Why torch has no kernel for a weight; None if it has."""
        if weight.device.type != "cuda":
            return f"torch has block-sparse kernels on CUDA alone, the weight is on {weight.device}"
        if any(size % self.blocksize for size in weight.shape):
            return f"blocks of {self.blocksize} do not divide {tuple(weight.shape)}"
        return None

    def put(self, module: nn.Linear) -> None:
        """Give a layer torch's kernel."""
        blocks = module.weight.detach().to_sparse_bsr((self.blocksize, self.blocksize))
        module.weight = nn.Parameter(blocks, requires_grad=False)


Filter = Callable[[nn.Module, str], bool]
"""Whether to take a module, by itself and its FQN."""


def sparsify_(
    model: nn.Module,
    config: SemiSparseWeightConfig | BlockSparseWeightConfig,
    filter_fn: Filter | None = None,
) -> nn.Module:
    """Give linear layers whose weights are sparse already a kernel for that sparsity, in place.

    It decides nothing and measures nothing; `lower` does. Where CUDA is absent, or torch has no
    kernel for the dtype, the layer gets this library's own packing instead, and what has none stays
    dense: both are logged as warnings, with the reason.

    Args:
        model: changed in place.
        config: the kernel.
        filter_fn: which modules; every `nn.Linear` by default.

    Returns:
        The model, which is another module where its root was replaced.

    Raises:
        LoweringError: a weight does not have the zeros that `config` is for. Nothing was changed.
    """
    chosen = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and (filter_fn is None or filter_fn(module, path))
    }
    if isinstance(config, SemiSparseWeightConfig):
        for path, module in chosen.items():
            if not follows_2_4(module.weight):
                raise LoweringError(
                    f"{path}.weight: expected two zeros among every four neighbours of a row; "
                    "prune it to '2:4' first"
                )
    packings: dict[str | type[nn.Module], str | None] = {}
    for path, module in chosen.items():
        refusal = config.refusal(module.weight)
        if refusal is None:
            config.put(module)
            continue
        instead = "it stays dense"
        for name in config.packings:
            if name in PACKINGS and DenseLinear(module.weight).refusal(name) is None:
                packings[f"{path}.weight".removeprefix(".")] = name
                instead = f"packed as {name!r} instead"
                break
        _log.warning("%s: %s; %s", path or "the model", refusal, instead)
    if packings:
        model, _ = lower(model, policy=packings)
    return model
