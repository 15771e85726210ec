"""Which mask goes on which tensor of a model: all that is decided before anything is changed."""

import copy
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fx_sparsity.sparsifier.mask import Mask
from fx_sparsity.sparsifier.target import MaskError, Target, check_maskable, mask_on
from fx_sparsity.sparsifier.utils import get_arg_info_from_tensor_fqn

OF_ONE_MODEL = ("module", "module_fqn", "tensor_name")
"""Keys of a group that follow from the model and its `tensor_fqn`; not part of its state."""

MASKED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.Embedding: ("weight",),
    nn.EmbeddingBag: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.MultiheadAttention: (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
    ),
}
"""Class of modules -> attributes that `prepare(config=None)` masks."""


class Placement(NamedTuple):
    """What `BaseSparsifier.prepare` does to one weight.

    Attributes:
        group: its configuration.
        target: the weight and its mask.
        fresh: whether the mask is new, and still to be put on.
        first: what the mask is to be, where the configuration says so.
    """

    group: dict[str, Any]
    target: Target
    fresh: bool
    first: Tensor | None


def merge_group(
    model: nn.Module, defaults: Mapping[str, Any], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """One group: defaults, the entry, and where the tensor lives.

    Raises:
        MaskError: no entry, a tensor that does not exist, or keys that contradict each other.
    """
    if not isinstance(entry, Mapping) or "tensor_fqn" not in entry:
        raise MaskError(f"a config entry is a dict with a `tensor_fqn`, found {entry!r}")
    info = get_arg_info_from_tensor_fqn(model, entry["tensor_fqn"])
    if not hasattr(info["module"], info["tensor_name"]):
        near = get_close_matches(info["tensor_fqn"], [n for n, _ in model.named_parameters()])
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise MaskError(f"the model has no tensor {info['tensor_fqn']!r}{hint}")
    for key in OF_ONE_MODEL:
        if key in entry and entry[key] != info[key]:
            raise MaskError(
                f"{info['tensor_fqn']}: `{key}` and `tensor_fqn` of its config do not agree"
            )
    return {**copy.deepcopy(defaults), **entry, **info}


def tensor_and_mask(group: Mapping[str, Any], in_graph: Mask | None) -> tuple[Tensor, Mask | None]:
    """The tensor of a group, and the mask that is on it already, if one is.

    Args:
        group: with `tensor_fqn`, `module` and `tensor_name`.
        in_graph: the mask through which a graph selects from the tensor, if one does.

    Raises:
        MaskError: no mask can go on the tensor.
    """
    name, module, attribute = group["tensor_fqn"], group["module"], group["tensor_name"]
    if in_graph is not None:
        return check_maskable(name, module, attribute), in_graph
    if (mask := mask_on(module, attribute)) is not None:
        return Target(name, [(module, attribute)], mask).original, mask
    return check_maskable(name, module, attribute), None


def tensor_of(model: nn.Module, name: str) -> Tensor | None:
    """The tensor of that name, beneath its mask if it has one; None where there is none."""
    info = get_arg_info_from_tensor_fqn(model, name)
    module, attribute = info["module"], info["tensor_name"]
    if not isinstance(module, nn.Module) or not hasattr(module, attribute):
        return None
    tensor = Target(name, [(module, attribute)], Mask(torch.empty(0))).original
    return tensor if isinstance(tensor, Tensor) else None


def check_divisor(name: str) -> None:
    """Whole rows may go unless a parametrization, such as a weight norm, divides by their norm.

    By the name alone, which stays what it was when a graph is captured.

    Raises:
        MaskError: naming the tensor.
    """
    if "parametrizations." in name:
        raise MaskError(
            f"{name} is combined with other tensors by a parametrization, which may divide by the "
            "norm of a row: none may be pruned whole; call remove_parametrizations first, or "
            "choose another pattern"
        )


def check_shape(name: str, tensor: Tensor, mask: Tensor) -> None:
    """Raise unless a mask has the shape of its tensor.

    Raises:
        MaskError: naming the tensor.
    """
    if mask.shape != tensor.shape:
        raise MaskError(
            f"{name}: expected a mask of shape {tuple(tensor.shape)}, found {tuple(mask.shape)}"
        )


def weights_of(model: nn.Module, kinds: Collection[type[nn.Module]]) -> list[str]:
    """FQNs of the weights of modules of some classes, each tensor once.

    A weight that its class computes, as quantized embeddings do from codes, is none to mask.

    Args:
        model: not changed.
        kinds: of those that `MASKED` does not have, `weight` is taken.
    """
    attributes = {kind: MASKED.get(kind, ("weight",)) for kind in kinds}
    found: dict[int, str] = {}
    for fqn, module in model.named_modules():
        for kind, names in attributes.items():
            for attribute in names if isinstance(module, kind) else ():
                if isinstance(getattr(type(module), attribute, None), property) and not (
                    parametrize.is_parametrized(module, attribute)
                ):
                    continue
                tensor = getattr(module, attribute)
                if tensor is not None:
                    found.setdefault(id(tensor), f"{fqn}.{attribute}".removeprefix("."))
    return list(found.values())
