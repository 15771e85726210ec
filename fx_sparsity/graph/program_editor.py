"""The one editor of ExportedPrograms: graph, signature and state change together, in a copy."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from fx_sparsity.graph.calls import bind
from fx_sparsity.graph.passes import is_mask_name, mask_path
from fx_sparsity.sparsifier import Mask


def insert_masks(program: ExportedProgram, masks: Mapping[str, Mask]) -> ExportedProgram:
    """Select weights through masks, as `InsertMasks` does in a GraphModule.

    Args:
        program: not changed, nor is the model that it came from.
        masks: FQN of a parameter -> its mask, whose buffers become buffers of the new program.
            Names with one mask are tied, also where loading the program has made them two tensors.

    Returns:
        A program with copies of these parameters; the other tensors are shared with `program`.
    """
    gm = _copied_graph(program)
    held: dict[int, Tensor] = {}
    state, constants = dict(program.state_dict), dict(program.constants)
    specs = list(program.graph_signature.input_specs)
    placeholders = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    nodes = {spec.target: placeholders[spec.arg.name] for spec in specs if spec.target in masks}
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for fqn, mask in masks.items():
        weight, path = nodes[fqn], mask_path(fqn)
        original = state[fqn]
        state[fqn] = held.setdefault(id(mask), _copy(original))
        state[f"{path}.mask"], constants[f"{path}.zero"] = mask.mask, mask.zero
        value = weight.meta["val"]
        added = {
            "mask": torch.empty_like(value, dtype=mask.mask.dtype),
            "zero": value.new_zeros(()),
        }
        inputs = [
            _added_buffer(gm.graph, specs, f"{path}.{name}", fake, persistent=name == "mask")
            for name, fake in added.items()
        ]
        users = list(weight.users)
        with gm.graph.inserting_before(first):
            masked = gm.graph.call_function(
                torch.ops.aten.where.self, (inputs[0], weight, inputs[1])
            )
        masked.meta = {**weight.meta, "val": torch.empty_like(value)}
        for user in users:
            user.replace_input_with(weight, masked)
    return _rebuilt(program, gm, specs, state, constants)


def remove_masks(program: ExportedProgram) -> ExportedProgram:
    """Undo `insert_masks`: consumers read the weights themselves again. `program` is unchanged."""
    gm = _copied_graph(program)
    specs = program.graph_signature.input_specs
    masks = {spec.arg.name for spec in specs if is_mask_name(spec.target)}
    for node in list(gm.graph.nodes):
        keep = node.args[0] if node.target is torch.ops.aten.where.self else None
        if isinstance(keep, fx.Node) and keep.name in masks:
            node.replace_all_uses_with(node.args[1])
            gm.graph.erase_node(node)
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name in masks:
            gm.graph.erase_node(node)
    state = {n: t for n, t in program.state_dict.items() if not is_mask_name(n)}
    constants = {n: t for n, t in program.constants.items() if not is_mask_name(n)}
    kept = [spec for spec in specs if not is_mask_name(spec.target)]
    return _rebuilt(program, gm, kept, state, constants)


class NodeCall(NamedTuple):
    """A module to compute what a node does. It mutates nothing.

    Attributes:
        path: FQN for the module's tensors.
        module: takes tensors or None, and gives a tensor.
        arguments: names of the node's arguments that it takes.
        result: name of the node that stands for what it gives: the node itself, or an element of
            it. Nothing else is read of the node.
    """

    path: str
    module: nn.Module
    arguments: tuple[str, ...]
    result: str


def replace_nodes(program: ExportedProgram, calls: Mapping[str, NodeCall]) -> ExportedProgram:
    """Compute what nodes compute by modules instead, whose tensors become buffers of the program.

    Parameters and buffers that only these nodes have read are gone.

    Args:
        program: not changed.
        calls: name of a node -> what takes its place.
    """
    gm = _copied_graph(program)
    state = dict(program.state_dict)
    specs = list(program.graph_signature.input_specs)
    nodes = {node.name: node for node in gm.graph.nodes}
    for name, call in calls.items():
        node, replaced = nodes[name], nodes[call.result]
        bound = bind(node)  # by now other nodes, where a call before has replaced them
        given = [bound.get(argument) for argument in call.arguments]
        tensors = {**dict(call.module.named_parameters()), **dict(call.module.named_buffers())}
        body = _traced(call.module, given, tensors)
        inputs = [value for value in given if value is not None]
        placeholders = body.graph.find_nodes(op="placeholder")
        inner = dict(zip(placeholders, inputs, strict=False))  # the others are tensors
        for inside, (attribute, tensor) in zip(
            placeholders[len(inputs) :], tensors.items(), strict=True
        ):
            fqn = f"{call.path}.{attribute}"
            inner[inside] = _added_buffer(gm.graph, specs, fqn, inside.meta["val"])
            state[fqn] = tensor.detach()
        with gm.graph.inserting_before(node):
            copied: Any = gm.graph.graph_copy(body.graph, inner)
        (result,) = copied
        result.meta = dict(replaced.meta)
        replaced.replace_all_uses_with(result)
        for unread in (*node.users, node):
            gm.graph.erase_node(unread)
        result.name = call.result  # by which the signature knows it if it is returned
    gm.graph.eliminate_dead_code()
    return _without_unread(program, gm, specs, state)


def _traced(
    module: nn.Module, given: Sequence[fx.Node | None], tensors: Mapping[str, Tensor]
) -> fx.GraphModule:
    """The operators of a module, in a graph that takes its inputs and then its tensors."""
    values = [value.meta["val"] for value in given if value is not None]
    mode = values[0].fake_mode
    fakes = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in tensors.values()]

    def call(*all_tensors: Tensor) -> tuple[Tensor]:
        inputs, held = all_tensors[: len(values)], all_tensors[len(values) :]
        each = iter(inputs)
        args = tuple(None if value is None else next(each) for value in given)
        return (functional_call(module, dict(zip(tensors, held, strict=True)), args),)

    with mode:
        return make_fx(call)(*values, *fakes)


def _added_buffer(
    graph: fx.Graph, specs: list[InputSpec], fqn: str, value: Tensor, *, persistent: bool = True
) -> fx.Node:
    """A placeholder for one more buffer, in a graph and in the inputs of its signature."""
    state_kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    place = 1 + max((i for i, spec in enumerate(specs) if spec.kind in state_kinds), default=-1)
    placeholders = graph.find_nodes(op="placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before([*placeholders, first][place]):
        added = graph.placeholder(f"b_{fqn}".replace(".", "_"))
    added.meta["val"] = value
    argument = TensorArgument(name=added.name)
    specs.insert(place, InputSpec(InputKind.BUFFER, argument, fqn, persistent))
    return added


def _without_unread(
    program: ExportedProgram, gm: fx.GraphModule, specs: list[InputSpec], state: dict[str, Any]
) -> ExportedProgram:
    """A program without the parameters and buffers that no node reads, but `program` did."""
    read_before = {node.name for node in program.graph.nodes if node.users}
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    kept = []
    for node, spec in zip(gm.graph.find_nodes(op="placeholder"), specs, strict=True):
        if spec.kind in kinds and not node.users and node.name in read_before:
            gm.graph.erase_node(node)
        else:
            kept.append(spec)
    held = {spec.target for spec in kept}
    gone = {spec.target for spec in specs if spec.target is not None} - held
    state = {fqn: tensor for fqn, tensor in state.items() if fqn not in gone}
    constants = {fqn: value for fqn, value in program.constants.items() if fqn not in gone}
    return _rebuilt(program, gm, kept, state, constants)


def _copied_graph(program: ExportedProgram) -> fx.GraphModule:
    """A copy whose nodes keep their names, which copying changes where they are Python's own."""
    gm = copy.deepcopy(program.graph_module)
    for node, copied in zip(program.graph.nodes, gm.graph.nodes, strict=True):
        copied.name = node.name
    return gm


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return tensor.detach().clone()


def _rebuilt(
    program: ExportedProgram,
    gm: fx.GraphModule,
    specs: list[InputSpec],
    state: dict[str, Any],
    constants: dict[str, Any],
) -> ExportedProgram:
    gm.graph.lint()
    gm.recompile()
    signature = copy.copy(program.graph_signature)
    signature.input_specs = specs
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )
