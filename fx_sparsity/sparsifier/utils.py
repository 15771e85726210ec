"""From names to modules and back; what parametrizes a module, and what takes its place."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations


def fqn_to_module(model: nn.Module | None, path: str) -> Any:
    """The module or tensor at a dotted path, or None where there is none."""
    found: Any = model
    for name in [part for part in path.split(".") if part]:
        found = getattr(found, name, None)
    return found


def module_to_fqn(model: nn.Module, module: nn.Module, prefix: str = "") -> str | None:
    """The dotted path of `module` inside `model`, or None; the root is the empty string."""
    for name, child in model.named_modules():
        if child is module:
            return ".".join(part for part in (prefix, name) if part)
    return None


def get_arg_info_from_tensor_fqn(model: nn.Module, tensor_fqn: str) -> dict[str, Any]:
    """Split a tensor's FQN.

    Returns:
        `module_fqn`, `module` (None where the path leads nowhere), `tensor_name`, `tensor_fqn`.
    """
    tensor_fqn = tensor_fqn.removeprefix(".")
    module_fqn, _, tensor_name = tensor_fqn.rpartition(".")
    return {
        "module_fqn": module_fqn,
        "module": fqn_to_module(model, module_fqn),
        "tensor_name": tensor_name,
        "tensor_fqn": tensor_fqn,
    }


def module_contains_param(module: nn.Module, parametrization: type[nn.Module]) -> bool:
    """Whether a parametrization of that class is on one of the module's own tensors."""
    entries: Any = getattr(module, "parametrizations", {})
    return any(isinstance(part, parametrization) for entry in entries.values() for part in entry)


def swap_module(mod: nn.Module, mapping: Mapping[type[nn.Module], Any]) -> nn.Module:
    """What takes the place of a module: with its hooks, on its device.

    Args:
        mod: not changed.
        mapping: module class -> class whose `from_dense(module)` makes the replacement.

    Returns:
        The replacement; `mod` itself where its class is not in `mapping`.

    Raises:
        ValueError: the module is on several devices.
    """
    kind = type_before_parametrizations(mod)
    if kind not in mapping:
        return mod
    devices = {tensor.device for tensor in chain(mod.parameters(), mod.buffers())}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{kind.__name__}: expected a module on one device, found {found}")
    swapped: nn.Module = mapping[kind].from_dense(mod)
    for before in mod._forward_pre_hooks.values():
        swapped.register_forward_pre_hook(before)
    for after in mod._forward_hooks.values():
        swapped.register_forward_hook(after)
    return swapped.to(device=next(iter(devices), None))
