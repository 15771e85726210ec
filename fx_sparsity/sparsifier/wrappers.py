"""Modules that stand around others, whose weights go by the names that they had before."""

from typing import Any

from torch import nn

_HELD_BY_PEFT = ("base_model", "model", "base_layer")
"""Children that are what one of peft's classes was put around."""


def run_by(module: nn.Module) -> nn.Module | None:
    """What torch.compile, or a wrapper for several devices, was given; None of all others."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    return module._modules.get("_orig_mod")


def held_by(module: nn.Module) -> nn.Module | None:
    """What a wrapper was put around, one that runs it or one of peft's; None of all others."""
    if any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__):
        found = (module._modules.get(name) for name in _HELD_BY_PEFT)
        return next((child for child in found if child is not None), None)
    return run_by(module)


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without what was put around it."""
    while (inner := held_by(module)) is not None:
        module = inner
    return module


def owner_of(model: nn.Module, fqn: str) -> tuple[Any, str]:
    """(the module that holds a tensor, its attribute there), also where wrappers came between.

    None in place of the module where the path leads nowhere.
    """
    path, _, attribute = fqn.rpartition(".")
    names = [name for name in path.split(".") if name]
    for step in (lambda module: module, unwrapped):
        module: Any = step(model)
        for name in names:
            module = module._modules.get(name) if module is not None else None
            module = None if module is None else step(module)
        if module is not None and hasattr(module, attribute):
            return module, attribute
    return None, attribute


def plain_paths(model: nn.Module) -> dict[str, str]:
    """Path of every module -> the path that it had before wrappers came; where they differ."""
    plain = {"": ""}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in modules:
        if path:
            above, _, name = path.rpartition(".")
            inner = held_by(modules[above]) is modules[path]
            plain[path] = plain[above] if inner else f"{plain[above]}.{name}".removeprefix(".")
    return {path: found for path, found in plain.items() if path != found}
