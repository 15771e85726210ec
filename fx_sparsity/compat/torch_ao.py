"""The names of `torch.ao.pruning`, those of its `_experimental` data sparsifiers included.

Changing where they are imported from is the whole migration. What both libraries have is the same
object here as everywhere else in fx_sparsity.
"""

from importlib import import_module
from typing import Any

from torch import nn

from fx_sparsity.compat.absent import STRUCTURED, refuse
from fx_sparsity.quantization import post_training_sparse_quantize
from fx_sparsity.sparsifier import (
    BaseDataScheduler,
    BaseDataSparsifier,
    BaseScheduler,
    BaseSparsifier,
    CubicSL,
    DataNormSparsifier,
    FakeSparsity,
    LambdaSL,
    NearlyDiagonalSparsifier,
    WeightNormSparsifier,
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
    "FakeSparsity",
    "LambdaSL",
    "NearlyDiagonalSparsifier",
    "WeightNormSparsifier",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "get_dynamic_sparse_quantized_mapping",
    "get_static_sparse_quantized_mapping",
    "module_contains_param",
    "module_to_fqn",
    "post_training_sparse_quantize",
    "swap_module",
]

LIGHTNING = ("PostTrainingDataSparsity", "TrainingAwareDataSparsity")
"""Names that need Lightning, which is imported when one of them is first asked for."""
ABSENT = {
    **STRUCTURED,
    "ActivationSparsifier": (
        "activations are not masked; torch.ao.pruning._experimental.activation_sparsifier does"
    ),
}
"""Names that only `torch.ao.pruning` has -> what to use."""


def get_static_sparse_quantized_mapping() -> dict[type[nn.Module], type[nn.Module]]:
    """Class of modules -> torch's sparse one for int8 with calibrated activations."""
    from torch.ao.nn.sparse.quantized import Linear

    return {nn.Linear: Linear}


def get_dynamic_sparse_quantized_mapping() -> dict[type[nn.Module], type[nn.Module]]:
    """Class of modules -> torch's sparse one for int8 with activations quantized at run time."""
    from torch.ao.nn.sparse.quantized.dynamic import Linear

    return {nn.Linear: Linear}


def __getattr__(name: str) -> Any:
    if name in LIGHTNING:
        return getattr(import_module("fx_sparsity.compat.data_sparsity"), name)
    return refuse(__name__, name, ABSENT)
