"""Taking over models that `torch.nn.utils.prune` pruned."""

from torch import nn
from torch.nn.utils import prune

from fx_sparsity.sparsifier.base import BaseSparsifier
from fx_sparsity.sparsifier.target import MaskError


def take_over_pruned(model: nn.Module, sparsifier: BaseSparsifier) -> list[str]:
    """Turn the masks of `torch.nn.utils.prune` into masks of a sparsifier, values and all.

    Args:
        model: pruned by that module, its reparametrizations still on; changed in place.
        sparsifier: holds the masks afterwards; its `step` would recompute them, and
            `enable_mask_update = False` keeps them as they are.

    Returns:
        FQNs of the weights taken over.

    Raises:
        MaskError: nothing in the model is pruned; nothing was changed.
    """
    pruned = [
        (name, module, key, hook)
        for name, module in model.named_modules()
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    if not pruned:
        raise MaskError("the model has no weight pruned by torch.nn.utils.prune")
    config = []
    for name, module, key, hook in pruned:
        attribute = str(hook._tensor_name)  # where prune itself keeps it; there is no public name
        original = module._parameters.pop(f"{attribute}_orig")
        mask = module._buffers.pop(f"{attribute}_mask")
        del module._forward_pre_hooks[key]
        delattr(module, attribute)
        module.register_parameter(attribute, original)
        config.append({"tensor_fqn": f"{name}.{attribute}".removeprefix("."), "mask": mask})
    sparsifier.prepare(model, config)
    return [str(entry["tensor_fqn"]) for entry in config]
