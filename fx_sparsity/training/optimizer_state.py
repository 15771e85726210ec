"""What an optimizer remembers of single elements of a weight."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from fx_sparsity.sparsifier import MaskError


@torch.no_grad()
def reset_state(optimizer: Optimizer | None, name: str, weight: Tensor, where: Tensor) -> None:
    """Set momenta, variances and whatever else is kept an element to zero.

    Counts of steps stay, as they are one for the whole weight.

    Args:
        optimizer: of any kind, foreach and fused alike; None is none to reset.
        name: of the weight, for messages.
        weight: a parameter of the optimizer.
        where: boolean, of the weight's shape.

    Raises:
        MaskError: the optimizer keeps sums over several elements, such as Adafactor's.
    """
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    held = [value for value in state.values() if isinstance(value, Tensor) and value.ndim]
    if any(value.shape != weight.shape for value in held):
        raise MaskError(
            f"{name}: {type(optimizer).__name__} does not keep its state an element, so that what "
            "it knows of weights that grow cannot be reset; train with another optimizer"
        )
    for value in held:
        value.masked_fill_(where, 0)
