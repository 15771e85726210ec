"""What an optimizer remembers of single elements of a weight."""

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from fx_sparsity.sparsifier import MaskError


def state_of_elements(optimizer: Optimizer | None, name: str, weight: Tensor) -> list[Tensor]:
    """Momenta, variances and whatever else is kept an element, to be edited in place.

    Counts of steps are none of them, as they are one for the whole weight.

    Args:
        optimizer: of any kind, foreach and fused alike; None has no state.
        name: of the weight, for messages.
        weight: a parameter of the optimizer.

    Raises:
        MaskError: the optimizer keeps sums over several elements, such as Adafactor's, codes of
            blocks, such as one of 8 bits, or the past of all weights in one, such as L-BFGS.
    """
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    held = [value for value in state.values() if isinstance(value, Tensor) and value.ndim]
    kind = type(weight.detach())
    if isinstance(optimizer, LBFGS) or any(
        value.shape != weight.shape or type(value) is not kind for value in held
    ):
        raise MaskError(
            f"{name}: {type(optimizer).__name__} does not keep its state an element, so that what "
            "it knows of weights that grow cannot be reset; train with another optimizer"
        )
    return held
