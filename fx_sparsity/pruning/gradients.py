"""Gradients of a loss with respect to weights, summed over calibration batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.pruning.batches import Batch

Loss = Callable[[Any, ExampleInputs], Tensor]
"""(what the model returns, the batch as it was given) -> a scalar."""


class Gradients(NamedTuple):
    """Sums over the batches, of the weight's shape.

    Attributes:
        total: of the gradient: float32.
        squares: of its square, batch by batch: float32.
    """

    total: Tensor
    squares: Tensor


def collect_gradients(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, weights: Mapping[str, Tensor]
) -> dict[str, Gradients]:
    """Gradients of the model as it is, by ordinary backward passes.

    `.grad` is neither read nor written, and `requires_grad` is as before afterwards.

    Args:
        model: in the mode that it is to run in.
        batches: to sum over.
        loss: a scalar of each batch.
        weights: FQN -> parameter of `model`.

    Raises:
        ValueError: the loss is no finite scalar.
    """
    if not weights:
        return {}
    found = {
        fqn: Gradients(*(torch.zeros_like(w, dtype=torch.float32) for _ in range(2)))
        for fqn, w in weights.items()
    }
    wanted = {id(weight) for weight in weights.values()}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in wanted)
        for batch in batches:
            with torch.enable_grad():
                value = loss(batch.call(model), batch.inputs)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite():
                    raise ValueError(
                        f"loss: expected a finite scalar tensor for batch {batch.number}, "
                        f"found {value!r}"
                    )
                gradients = torch.autograd.grad(
                    value.sum(), list(weights.values()), allow_unused=True
                )
            for fqn, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    found[fqn].total.add_(gradient)
                    found[fqn].squares.add_(gradient.float().square())
    finally:
        for parameter, required in before.items():
            if parameter.is_floating_point():
                parameter.requires_grad_(required)
    return found
