"""From a model to a graph, and from a graph's nodes to the tensors that they stand for.

A frontend differs from the others by one function, `source(node) -> (fqn, tensor)`.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

ExampleInputs = tuple[Any, ...] | Mapping[str, Any] | Tensor
Source = Callable[[fx.Node], tuple[str, Tensor] | None]


class InputError(ValueError):
    """The model rejects the example inputs."""


class CaptureError(RuntimeError):
    """The model runs, but no graph of it can be captured."""


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


def export_model(
    model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any = None
) -> ExportedProgram:
    """Capture a model with `torch.export`, non-strict and undecomposed: the canonical graph.

    The model is not changed, nor run on data.

    Args:
        model: in the mode (train, eval) that is to be captured.
        example_inputs: a tuple of positional, or a dict of keyword arguments.
        dynamic_shapes: as `torch.export.export` takes it; a plain export accepts no other shapes
            than the example's.

    Raises:
        InputError: the model rejects the inputs, with its own words.
        CaptureError: the model runs on them but cannot be exported, with torch's words.
    """
    args, kwargs = call_arguments(example_inputs)
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as export_error:
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"example_inputs: {type(model).__name__} rejects them: "
                f"{type(error).__name__}: {error}"
            ) from error
        raise CaptureError(
            f"{type(model).__name__} runs on example_inputs, but torch.export cannot capture it: "
            f"{type(export_error).__name__}: {export_error}"
        ) from export_error


def exported_source(program: ExportedProgram) -> Source:
    """Parameters and buffers are placeholders, listed in the program's signature."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def source(node: fx.Node) -> tuple[str, Tensor] | None:
        if node.op != "placeholder" or (fqn := names.get(node.name)) is None:
            return None
        tensor = program.state_dict.get(fqn, program.constants.get(fqn))
        return None if tensor is None else (fqn, tensor)

    return source


def module_source(gm: fx.GraphModule) -> Source:
    """Parameters and buffers are `get_attr` nodes."""

    def source(node: fx.Node) -> tuple[str, Tensor] | None:
        if node.op != "get_attr":
            return None
        tensor = operator.attrgetter(str(node.target))(gm)
        return (str(node.target), tensor) if isinstance(tensor, Tensor) else None

    return source
