"""The names of torchao's `sparsity` and `prototype.sparsity`; `sparsify_` above all.

It gives sparse kernels to weights that are sparse already.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from torch import Tensor, nn

from fx_sparsity.compat.absent import STRUCTURED, refuse
from fx_sparsity.kernels.packings import PACKINGS
from fx_sparsity.kernels.semi_structured import (
    follows_2_4,
    put_semi_structured,
    semi_structured_refusal,
)
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lower import lower
from fx_sparsity.lowering.policy import LoweringError
from fx_sparsity.pruning.methods import WandaSparsifier
from fx_sparsity.sparsifier import (
    BaseScheduler,
    BaseSparsifier,
    CubicSL,
    FakeSparsity,
    LambdaSL,
    NearlyDiagonalSparsifier,
    WeightNormSparsifier,
    fqn_to_module,
    get_arg_info_from_tensor_fqn,
    module_to_fqn,
)

__all__ = [
    "BaseScheduler",
    "BaseSparsifier",
    "BlockSparseWeightConfig",
    "CubicSL",
    "FakeSparsity",
    "LambdaSL",
    "NearlyDiagonalSparsifier",
    "SemiSparseWeightConfig",
    "WandaSparsifier",
    "WeightNormSparsifier",
    "apply_fake_sparsity",
    "block_sparse_weight",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "module_to_fqn",
    "semi_sparse_weight",
    "sparsify_",
]

_TRAINING = (
    "training runs on dense kernels: fx_sparsity.prepare puts the masks on, sparsify_ comes after"
)
_MASKS = "masks are computed by fx_sparsity.masks.compute_mask, from any pattern"
ABSENT = {
    **STRUCTURED,
    "BlockSparseTensor": "sparsify_ with BlockSparseWeightConfig puts torch's own BSR tensors",
    "PerChannelNormObserver": "fx_sparsity.prune observes the inputs of every weight by itself",
    "SemiSparseActivationLinear": _TRAINING,
    "SemiSparseLinear": _TRAINING,
    "SupermaskLinear": (
        "masks are not trained; fx_sparsity.pruning.methods.MovementSparsifier ranks weights by "
        "where training moves them"
    ),
    "create_block_sparse_tensor": _MASKS,
    "create_semi_structured_tensor": _MASKS,
    "mask_creator": _MASKS,
    "swap_linear_with_semi_sparse_linear": _TRAINING,
    "swap_semi_sparse_linear_with_linear": _TRAINING,
}
"""Names that only torchao had -> what to use."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SemiSparseWeightConfig:
    """2:4 weights: torch's semi-structured tensors on CUDA, packing `"nm"` elsewhere.

    Attributes:
        alg_id: which of cuSPARSELt's algorithms multiplies.
    """

    alg_id: int = 0
    packings: ClassVar = ("nm", "bitmask")

    def refusal(self, weight: Tensor) -> str | None:
        """Why torch has no kernel for a weight; None if it has."""
        return semi_structured_refusal(weight)

    def put(self, module: nn.Linear) -> None:
        """Give a layer torch's kernel."""
        put_semi_structured(module, self.alg_id)


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


semi_sparse_weight = SemiSparseWeightConfig
block_sparse_weight = BlockSparseWeightConfig

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

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> model[0].weight.data[:, ::2] = 0
        >>> model = fxs.sparsify_(model, fxs.SemiSparseWeightConfig())
        >>> model[0].packing
        'nm'
    """
    chosen = _linears(model, filter_fn)
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


def apply_fake_sparsity(model: nn.Module, *, filter_fn: Filter | None = None) -> None:
    """Prune linear layers to 2:4 by magnitude, in place; their weights stay dense tensors.

    Args:
        model: changed in place.
        filter_fn: which modules; every `nn.Linear` by default.

    Raises:
        PatternError: 2:4 does not fit a weight. Nothing was changed.
    """
    names = {
        id(layer.weight): f"{path}.weight" for path, layer in _linears(model, filter_fn).items()
    }
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": fqn, "pattern": "2:4"} for fqn in names.values()])
    sparsifier.step()
    sparsifier.squash_mask()


def _linears(model: nn.Module, filter_fn: Filter | None) -> dict[str, nn.Linear]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and (filter_fn is None or filter_fn(module, path))
    }


def __getattr__(name: str) -> NoReturn:
    refuse(__name__, name, ABSENT)
