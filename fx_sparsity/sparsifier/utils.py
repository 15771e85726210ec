"""From names to modules and back."""

from typing import Any

from torch import nn


def fqn_to_module(model: nn.Module, path: str) -> Any:
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
