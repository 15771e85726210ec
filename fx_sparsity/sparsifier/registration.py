"""Seeing what others put around masked modules, when they do."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

Handler = Callable[[nn.Module, str, nn.Module], None]
"""(module, name, its new child) -> nothing."""
_HANDLERS: set[Handler] = set()


def on_registration(handler: Handler) -> None:
    """Call a function whenever a module is put into another, from now on; once however often asked.

    Args:
        handler: does nothing for modules that are none of its business.
    """
    if handler in _HANDLERS:
        return
    _HANDLERS.add(handler)

    def hook(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if submodule is not None:
            handler(module, name, submodule)

    register_module_module_registration_hook(hook)
