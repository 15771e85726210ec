"""From a model to a graph, and from a graph's nodes to the tensors that they stand for.

A frontend differs from the others by one function, `source(node) -> (fqn, tensor)`.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.compiled import (
    fake_names,
    fake_place,
    input_position,
    input_target,
    is_compiled,
    is_fake,
    source_target,
)
from fx_sparsity.graph.operators import MODULES

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
        run_undisturbed(model, lambda: model(*args, **kwargs))
        raise CaptureError(
            f"{type(model).__name__} runs on example_inputs, but torch.export cannot capture it: "
            f"{type(export_error).__name__}: {export_error}"
        ) from export_error


def run_undisturbed(model: nn.Module, call: Callable[[], Any]) -> None:
    """Run a model on data without a trace of it: buffers and random state are put back.

    Raises:
        InputError: the model raises, with its own words.
    """
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            call()
    except Exception as error:
        raise InputError(
            f"example_inputs: {type(model).__name__} rejects them: {type(error).__name__}: {error}"
        ) from error
    finally:
        for buffer, value in before.values():
            buffer.copy_(value)


def trace_model(model: nn.Module) -> fx.GraphModule:
    """Trace a model symbolically, with every module opened up but those that the table knows.

    Raises:
        Exception: whatever the model's code raises when it is run on proxies.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            holds = any(parameter.ndim >= 2 for parameter in m.parameters())
            known = isinstance(m, tuple(MODULES))
            return known or (not holds and super().is_leaf_module(m, module_qualified_name))

    return fx.GraphModule(model, Tracer().trace(model))


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


def exported_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, then buffers and constants, by FQN; a tied tensor is one object.

    A program that was saved and loaded holds ties as several tensors over one storage, in an order
    of its own.
    """
    signature, held = program.graph_signature, {**program.state_dict, **program.constants}
    tensors = {name: held[name] for name in signature.parameters} | held
    first: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            tensors[name] = first.setdefault(place, tensor)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def module_source(gm: fx.GraphModule) -> Source:
    """Parameters and buffers are `get_attr` nodes."""

    def source(node: fx.Node) -> tuple[str, Tensor] | None:
        if node.op != "get_attr":
            return None
        tensor = operator.attrgetter(str(node.target))(gm)
        return (str(node.target), tensor) if isinstance(tensor, Tensor) else None

    return source


def graph_source(
    gm: fx.GraphModule, example_inputs: ExampleInputs | None, model: nn.Module | None
) -> Source:
    """The source of a GraphModule's tensors, wherever it comes from; see `compiled_source`."""
    if not is_compiled(gm):
        return module_source(gm)
    inputs, _ = call_arguments(() if example_inputs is None else example_inputs)
    return compiled_source(gm, inputs, model)


def inputs_without_data(gm: fx.GraphModule, example_inputs: ExampleInputs | None) -> list[str]:
    """Names of a backend's inputs that are absent from `example_inputs`, or fake there."""
    if not is_compiled(gm):
        return []
    inputs, _ = call_arguments(() if example_inputs is None else example_inputs)
    absent = []
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        place = input_position(node, position)
        if place is None or place >= len(inputs) or is_fake(inputs[place]):
            absent.append(source_target(node) or node.name)
    return absent


def compiled_source(
    gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module | None = None
) -> Source:
    """Parameters and buffers are placeholders that `torch.compile` lifted them to.

    Args:
        gm: the graph that a backend receives from Dynamo, or from AOTAutograd below it.
        example_inputs: what the backend received with the Dynamo graph.
        model: tells the names, by identity: of the inputs, or of what AOTAutograd faked. Without it
            they are read off Dynamo's notes, as far as these lead to a module; other parameters go
            by the name of their node.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    position = {node: input_position(node, i) for i, node in enumerate(placeholders)}
    tensors = {} if model is None else dict(named_tensors(model))
    named = {id(tensor): fqn for fqn, tensor in reversed(tensors.items())}
    faked = fake_names(gm, tensors)
    attribute = module_source(gm)

    def source(node: fx.Node) -> tuple[str, Tensor] | None:
        if node not in position:
            found = attribute(node)
            return None if found is None else (named.get(id(found[1]), found[0]), found[1])
        place = position[node]
        given = place is not None and place < len(example_inputs)
        tensor = example_inputs[place] if given else None  # type: ignore[index]
        if model is None:
            tensor = node.meta.get("val") if tensor is None else tensor
            unnamed = node.name if isinstance(tensor, nn.Parameter) else None
            fqn = input_target(node) or source_target(node) or unnamed
        else:
            # What was added to the graph, such as a mask, keeps the name that it has there.
            fqn = named.get(id(tensor)) or faked.get(fake_place(node)) or input_target(node)
            tensor = tensors.get(fqn or "", node.meta.get("val"))
        return (fqn, tensor) if fqn is not None and isinstance(tensor, Tensor) else None

    return source


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, under each of their names."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
