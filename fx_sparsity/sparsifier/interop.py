"""Taking over models that `torch.nn.utils.prune` pruned."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from fx_sparsity.sparsifier.base import BaseSparsifier
from fx_sparsity.sparsifier.target import MaskError


def take_over_pruned(model: nn.Module, sparsifier: BaseSparsifier) -> list[str]:
    """Turn the masks of `torch.nn.utils.prune` into masks of a sparsifier, values and all.

    Whatever is raised, by `prepare` too, nothing was changed.

    Args:
        model: pruned by that module, its reparametrizations still on; changed in place.
        sparsifier: holds the masks afterwards; its `step` would recompute them, and
            `enable_mask_update = False` keeps them as they are.

    Returns:
        FQNs of the weights taken over.

    Raises:
        MaskError: nothing in the model is pruned, or a tied weight twice, differently.
    """
    pruned = [
        (name, module, key, hook)
        for name, module in model.named_modules()
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    if not pruned:
        raise MaskError("the model has no weight pruned by torch.nn.utils.prune")
    first: dict[int, int] = {}
    config: list[dict[str, Any]] = []
    for name, module, _, hook in pruned:
        attribute = str(hook._tensor_name)  # where prune itself keeps it; there is no public name
        fqn = f"{name}.{attribute}".removeprefix(".")
        mask = module._buffers[f"{attribute}_mask"]
        original = module._parameters[f"{attribute}_orig"]
        if id(original) not in first:
            first[id(original)] = len(config)
            config.append({"tensor_fqn": fqn, "mask": mask})
        elif not torch.equal(config[first[id(original)]]["mask"], mask):
            raise MaskError(
                f"{fqn} is the same tensor as {config[first[id(original)]]['tensor_fqn']}, "
                "pruned otherwise"
            )
    for _, module, key, hook in pruned:
        _to_parameter(module, key, hook)
    try:
        sparsifier.prepare(model, config)
    except BaseException:
        for _, module, key, hook in pruned:
            _to_pruned(module, key, hook)
        raise
    for _, module, _, hook in pruned:
        del module._buffers[f"{hook._tensor_name}_mask"]
    return [str(entry["tensor_fqn"]) for entry in config]


def _to_parameter(module: nn.Module, key: int, hook: prune.BasePruningMethod) -> None:
    """Undo the reparametrization; the mask buffer stays for now."""
    del module._forward_pre_hooks[key]
    delattr(module, hook._tensor_name)
    original = module._parameters.pop(f"{hook._tensor_name}_orig")
    module.register_parameter(hook._tensor_name, original)


def _to_pruned(module: nn.Module, key: int, hook: prune.BasePruningMethod) -> None:
    """Redo it."""
    original = module._parameters.pop(hook._tensor_name)
    module.register_parameter(f"{hook._tensor_name}_orig", original)
    module._forward_pre_hooks[key] = hook
    hook(module, None)
