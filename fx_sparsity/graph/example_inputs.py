"""What a model is called with: example inputs in the forms that users give, and a run on them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.opaque import copied

ExampleInputs = tuple[Any, ...] | Mapping[str, Any] | Tensor


class InputError(FxSparsityError, ValueError):
    """The model rejects the example inputs."""


def call_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call: a tuple is the former, a mapping the latter.

    Raises:
        InputError: `example_inputs` is neither, nor a single tensor.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise InputError(
        "example_inputs: expected a tuple of positional arguments, a dict of keyword arguments "
        f"or a tensor, found {type(example_inputs).__name__}"
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Where a model may run on data without a trace of it: buffers and random state are put back.

    Raises:
        InputError: whatever is raised inside, with its own words.
    """
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    except Exception as error:
        raise InputError(
            f"example_inputs: {type(model).__name__} rejects them: {type(error).__name__}: {error}"
        ) from error
    finally:
        for buffer, value in before.values():
            buffer.copy_(value)


def run_undisturbed(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run a model on its example inputs, see `undisturbed`."""
    args, kwargs = call_arguments(example_inputs)
    with undisturbed(model):
        model(*copied(args), **copied(kwargs))
