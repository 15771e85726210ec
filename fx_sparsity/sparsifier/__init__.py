"""The sparsifier core: masks on named tensors, computed, stepped, squashed and recorded."""

from fx_sparsity.sparsifier.base import BaseSparsifier
from fx_sparsity.sparsifier.core import SparsifierCore
from fx_sparsity.sparsifier.data import BaseDataSparsifier
from fx_sparsity.sparsifier.dense_state import dense_state_dict, load_dense_state_dict
from fx_sparsity.sparsifier.hold import Hold, hold
from fx_sparsity.sparsifier.interop import take_over_pruned
from fx_sparsity.sparsifier.mask import FakeSparsity, Mask
from fx_sparsity.sparsifier.nearly_diagonal import NearlyDiagonalSparsifier
from fx_sparsity.sparsifier.norm import DataNormSparsifier, WeightNormSparsifier
from fx_sparsity.sparsifier.record import MaskRecord, SparsityRecord
from fx_sparsity.sparsifier.recorded import RecordedMasks
from fx_sparsity.sparsifier.schedule import BaseDataScheduler, BaseScheduler, CubicSL, LambdaSL
from fx_sparsity.sparsifier.target import DetachedError, MaskError
from fx_sparsity.sparsifier.utils import (
    fqn_to_module,
    get_arg_info_from_tensor_fqn,
    module_contains_param,
    module_to_fqn,
    swap_module,
)

__all__ = [
    "BaseDataScheduler",
    "BaseDataSparsifier",
    "BaseScheduler",
    "BaseSparsifier",
    "CubicSL",
    "DataNormSparsifier",
    "DetachedError",
    "FakeSparsity",
    "Hold",
    "LambdaSL",
    "Mask",
    "MaskError",
    "MaskRecord",
    "NearlyDiagonalSparsifier",
    "RecordedMasks",
    "SparsifierCore",
    "SparsityRecord",
    "WeightNormSparsifier",
    "dense_state_dict",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "hold",
    "load_dense_state_dict",
    "module_contains_param",
    "module_to_fqn",
    "swap_module",
    "take_over_pruned",
]
