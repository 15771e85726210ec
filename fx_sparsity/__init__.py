"""Find, mask, quantize and prove weight sparsity in any PyTorch model, from its graph."""

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from fx_sparsity.checkpoints import prune_checkpoint, sparsify_checkpoint
from fx_sparsity.compat.torchao import SemiSparseWeightConfig, sparsify_
from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph import SparsityMapping, WeightMap, find_weights, prepare, squash, unprepare
from fx_sparsity.lowering import lower, unlower
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.pruning import prune
from fx_sparsity.pruning.methods import (
    MagnitudeSparsifier,
    Pipeline,
    SparseGPTSparsifier,
    WandaSparsifier,
)
from fx_sparsity.quantization import post_training_sparse_quantize, sparsify_and_quantize
from fx_sparsity.sparsifier import (
    BaseDataScheduler,
    BaseDataSparsifier,
    BaseScheduler,
    BaseSparsifier,
    CubicSL,
    DataNormSparsifier,
    LambdaSL,
    Mask,
    SparsityRecord,
    WeightNormSparsifier,
    hold,
)
from fx_sparsity.storage import export, load, load_sparse, save
from fx_sparsity.verification import verify

__version__ = version("fx_sparsity")

__all__ = [
    "BaseDataScheduler",
    "BaseDataSparsifier",
    "BaseScheduler",
    "BaseSparsifier",
    "CubicSL",
    "DataNormSparsifier",
    "FxSparsityError",
    "LambdaSL",
    "MagnitudeSparsifier",
    "Mask",
    "Pipeline",
    "SemiSparseWeightConfig",
    "SparseGPTSparsifier",
    "SparsityConfig",
    "SparsityMapping",
    "SparsityRecord",
    "WandaSparsifier",
    "WeightMap",
    "WeightNormSparsifier",
    "export",
    "find_weights",
    "hold",
    "load",
    "load_sparse",
    "lower",
    "post_training_sparse_quantize",
    "prepare",
    "prune",
    "prune_checkpoint",
    "save",
    "sparsify_",
    "sparsify_and_quantize",
    "sparsify_checkpoint",
    "squash",
    "unlower",
    "unprepare",
    "verify",
]


def __getattr__(name: str) -> ModuleType:
    """Rooms that are imported when they are first asked for: importing the package stays quick."""
    if name in ("passes", "reporting", "training"):
        return import_module(f"fx_sparsity.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
