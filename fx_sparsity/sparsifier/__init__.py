"""The sparsifier core: masks on named tensors, computed, stepped, squashed and recorded."""

from fx_sparsity.sparsifier.base import BaseSparsifier
from fx_sparsity.sparsifier.core import SparsifierCore
from fx_sparsity.sparsifier.data import BaseDataSparsifier
from fx_sparsity.sparsifier.mask import FakeSparsity, Mask
from fx_sparsity.sparsifier.norm import DataNormSparsifier, WeightNormSparsifier
from fx_sparsity.sparsifier.record import MaskRecord, SparsityRecord
from fx_sparsity.sparsifier.target import MaskError
from fx_sparsity.sparsifier.utils import (
    fqn_to_module,
    get_arg_info_from_tensor_fqn,
    module_to_fqn,
)

__all__ = [
    "BaseDataSparsifier",
    "BaseSparsifier",
    "DataNormSparsifier",
    "FakeSparsity",
    "Mask",
    "MaskError",
    "MaskRecord",
    "SparsifierCore",
    "SparsityRecord",
    "WeightNormSparsifier",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "module_to_fqn",
]
