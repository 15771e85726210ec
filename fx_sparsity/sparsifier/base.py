"""The model-bound sparsifier: masks on the weights of a model, named by FQN."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from fx_sparsity.sparsifier.core import SparsifierCore
from fx_sparsity.sparsifier.mask import Mask
from fx_sparsity.sparsifier.target import (
    MaskError,
    Target,
    check_maskable,
    owners_by_identity,
)
from fx_sparsity.sparsifier.utils import get_arg_info_from_tensor_fqn


class BaseSparsifier(SparsifierCore):
    """Base class of every sparsifier that works on a model. Override `update_mask`.

    Args:
        defaults: configuration of every weight; an entry given to `prepare` overrides it.

    Attributes:
        groups: one dict for each masked weight: the merged configuration, and `module`,
            `module_fqn`, `tensor_name`, `tensor_fqn`.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None) -> None:
        super().__init__(defaults)
        self.groups: list[dict[str, Any]] = []
        self.model: nn.Module | None = None

    @abstractmethod
    def update_mask(self, module: nn.Module, tensor_name: str, **config: Any) -> None:
        """Compute the mask of `module.tensor_name` and write it, in place.

        Args:
            module: owner of the weight.
            tensor_name: the weight's attribute on it.
            config: the rest of the group: `tensor_fqn`, `module_fqn` and the configuration.
        """

    def prepare(self, model: nn.Module, config: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Put a mask, all ones, on weights of `model`, in place.

        A tied weight is masked once, by one mask on every module that holds it.

        Args:
            model: modified in place; nothing is changed where this raises.
            config: dicts with a `tensor_fqn` and whatever overrides the defaults. A `mask` entry
                gives the first mask and its dtype (`ones_like` the weight otherwise). None takes
                the weight of every linear, embedding, convolution and attention module.

        Raises:
            MaskError: a weight that does not exist, is not floating, is masked already, or is
                listed twice; it is named.
        """
        entries = [{"tensor_fqn": fqn} for fqn in _weights_of(model)] if config is None else config
        owners = owners_by_identity(model)
        targets: list[Target] = []
        groups: list[dict[str, Any]] = []
        seen: dict[int, str] = {}
        for entry in entries:
            group = self._merge(model, entry)
            name, module, attribute = group["tensor_fqn"], group["module"], group["tensor_name"]
            if name in self._targets:
                raise MaskError(f"{name} is already masked by this sparsifier")
            tensor = check_maskable(name, module, attribute)
            if id(tensor) in seen:
                raise MaskError(
                    f"{name} is the same tensor as {seen[id(tensor)]}; list one of them"
                )
            seen[id(tensor)] = name
            in_graph = group.get("mask_module") is not None
            if in_graph:
                mask = group["mask_module"]
            else:
                mask = Mask(group.get("mask", torch.ones_like(tensor)))
            if mask.mask.shape != tensor.shape:
                raise MaskError(
                    f"{name}: expected a mask of shape {tuple(tensor.shape)}, "
                    f"found {tuple(mask.mask.shape)}"
                )
            group = {k: v for k, v in group.items() if k not in ("mask", "mask_module")}
            self.check_config(name, tensor, group)
            holders = owners.get(id(tensor), [(module, attribute)])
            targets.append(Target(name, holders, mask, in_graph))
            groups.append(group)
        self._add(targets)
        self.groups += groups
        self.model = model

    def config_of(self, name: str) -> dict[str, Any]:
        """See `SparsifierCore.config_of`."""
        self._target(name)
        return next(group for group in self.groups if group["tensor_fqn"] == name)

    def squash_mask(
        self,
        params_to_keep: Sequence[str] | None = None,
        params_to_keep_per_layer: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Bake every mask into its weight and take the parametrization off.

        Args:
            params_to_keep: keys of a group to leave on its module, in a dict `sparse_params`.
            params_to_keep_per_layer: the same for single modules, by module FQN.

        Raises:
            KeyError: a key that a group does not have; nothing was squashed.
        """
        kept: list[tuple[nn.Module, dict[str, Any]]] = []
        for group in self.groups:
            keys = [
                *(params_to_keep or ()),
                *(params_to_keep_per_layer or {}).get(group["module_fqn"], ()),
            ]
            if keys:
                kept.append((group["module"], {key: group[key] for key in keys}))
        self._squash(self._targets)
        for module, params in kept:
            module.sparse_params = params  # type: ignore[assignment]

    def _update(self, name: str) -> None:
        self.update_mask(**self.config_of(name))

    def _merge(self, model: nn.Module, entry: Mapping[str, Any]) -> dict[str, Any]:
        """One group: defaults, the entry, and where the tensor lives."""
        if "tensor_fqn" not in entry:
            raise MaskError(f"a config entry needs a `tensor_fqn`, found keys {sorted(entry)}")
        info = get_arg_info_from_tensor_fqn(model, entry["tensor_fqn"])
        if not isinstance(info["module"], nn.Module) or not hasattr(
            info["module"], info["tensor_name"]
        ):
            near = get_close_matches(info["tensor_fqn"], [n for n, _ in model.named_parameters()])
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise MaskError(f"the model has no tensor {info['tensor_fqn']!r}{hint}")
        return {**self.defaults, **entry, **info}

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.groups):
            lines += [f"\tGroup {i}", f"\t    module: {group['module']}"]
            lines += [f"\t    {key}: {group[key]}" for key in sorted(group) if key != "module"]
        return "\n".join([*lines, ")"])


def _weights_of(model: nn.Module) -> list[str]:
    """FQNs of the weights that `prepare(config=None)` takes, each tensor once."""
    attributes: dict[type[nn.Module], tuple[str, ...]] = {
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
    found: dict[int, str] = {}
    for fqn, module in model.named_modules():
        for kind, names in attributes.items():
            for attribute in names if isinstance(module, kind) else ():
                tensor = getattr(module, attribute)
                if tensor is not None:
                    found.setdefault(id(tensor), f"{fqn}.{attribute}".removeprefix("."))
    return list(found.values())
