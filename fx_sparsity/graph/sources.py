"""The tensors of a model: by name, and by the node of a graph that stands for one.

A frontend differs from the others by one function, `source(node) -> (fqn, tensor)`.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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
from fx_sparsity.graph.example_inputs import ExampleInputs, call_arguments

Source = Callable[[fx.Node], tuple[str, Tensor] | None]
_TORCHS_OWN = vars(nn.Module()).keys()
"""Attributes that every module has; registered tensors and modules are in some of these."""


def exported_source(program: ExportedProgram) -> Source:
    """Parameters, buffers and constants are placeholders, listed in the program's signature."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }

    def source(node: fx.Node) -> tuple[str, Tensor] | None:
        if node.op != "placeholder" or (fqn := names.get(node.name)) is None:
            return None
        tensor = program.state_dict.get(fqn, program.constants.get(fqn))
        return (fqn, tensor) if isinstance(tensor, Tensor) else None

    return source


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
            by the name of their node, as do those of a second module that a function calls, where
            the first has the same names.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    position = {node: input_position(node, i) for i, node in enumerate(placeholders)}
    tensors = {} if model is None else dict(named_tensors(model)) | attribute_tensors(model)
    named = {id(tensor): fqn for fqn, tensor in reversed(tensors.items())}
    faked = fake_names(gm, tensors)
    attribute = module_source(gm)
    noted = _noted_names(placeholders)

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
            fqn = input_target(node) or noted.get(node, unnamed)
        else:
            # What was added to the graph, such as a mask, keeps the name that it has there.
            fqn = named.get(id(tensor)) or faked.get(fake_place(node)) or input_target(node)
            tensor = tensors.get(fqn or "", node.meta.get("val"))
        return (fqn, tensor) if fqn is not None and isinstance(tensor, Tensor) else None

    return source


def _noted_names(placeholders: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """The names that Dynamo noted; one that two tensors have is that of the first."""
    first = {source_target(node): node for node in reversed(placeholders)}
    return {
        node: fqn if first[fqn] is node else node.name
        for node in placeholders
        if (fqn := source_target(node)) is not None
    }


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, under each of their names."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def attribute_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that a model holds neither as parameters nor as buffers, by the path to them.

    They are attributes of its modules, also in lists, tuples and dicts, and whatever modules hold
    that stand in these, where torch does not look for them.
    """
    registered = {id(tensor) for _, tensor in named_tensors(model)}
    held = ((path, found) for path, found in _held("", model, set()) if isinstance(found, Tensor))
    return {path: tensor for path, tensor in held if id(tensor) not in registered}


def attribute_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that a model holds where torch does not look for them; see `attribute_tensors`."""
    registered = set(model.modules())
    held = (
        (path, found) for path, found in _held("", model, set()) if isinstance(found, nn.Module)
    )
    return {path: module for path, module in held if module not in registered}


def _held(path: str, holder: object, seen: set[int]) -> Iterator[tuple[str, Tensor | nn.Module]]:
    """(path, what is there) of every tensor and module within reach; the first path to each."""
    if id(holder) in seen:
        return
    if isinstance(holder, Tensor | nn.Module | Mapping | list | tuple):
        seen.add(id(holder))
    if isinstance(holder, Tensor | nn.Module):
        yield path, holder
    for name, member in _members(holder):
        yield from _held(f"{path}.{name}" if path else str(name), member, seen)


def _members(holder: object) -> Iterable[tuple[object, object]]:
    """What a module or a container holds, by name, key or place."""
    if isinstance(holder, nn.Module):
        own = {name: held for name, held in vars(holder).items() if name not in _TORCHS_OWN}
        return [*holder._parameters.items(), *holder._modules.items(), *own.items()]
    if isinstance(holder, Mapping):
        return holder.items()
    return enumerate(holder) if isinstance(holder, list | tuple) else ()


def place_of(tensor: Tensor) -> Any:
    """What tells a tensor from others by the memory that it shows; None where that does not."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def exported_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, then buffers and constants, by FQN; a tied tensor is one object.

    A program that was saved and loaded holds ties as several tensors over one storage, in an order
    of its own.
    """
    signature, held = program.graph_signature, {**program.state_dict, **program.constants}
    tensors = {name: held[name] for name in signature.parameters} | held
    first: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (place := place_of(tensor)) is not None:
            tensors[name] = first.setdefault(place, tensor)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
