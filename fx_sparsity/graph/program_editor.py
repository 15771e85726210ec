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
    place = _after_state(specs)
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    following = [*placeholders.values(), first][place]
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
        inputs = []
        for name, fake in added.items():
            with gm.graph.inserting_before(following):
                node = gm.graph.placeholder(f"b_{path}.{name}".replace(".", "_"))
            node.meta["val"] = fake
            argument, target = TensorArgument(name=node.name), f"{path}.{name}"
            persistent = name == "mask"
            specs.insert(place, InputSpec(InputKind.BUFFER, argument, target, persistent))
            place += 1
            inputs.append(node)
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
    for name, (path, module, arguments, result_name) in calls.items():
        node, replaced = nodes[name], nodes[result_name]
        bound = bind(node)  # by now other nodes, where a call before has replaced them
        given = [bound.get(argument) for argument in arguments]
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        body = _traced(module, given, tensors)
        first = next(n for n in gm.graph.nodes if n.op != "placeholder")
        inner: dict[fx.Node, fx.Node] = {}
        inputs = iter(value for value in given if isinstance(value, fx.Node))
        names = iter(tensors)
        for inside in body.graph.nodes:
            if inside.op == "placeholder" and (held := next(inputs, None)) is not None:
                inner[inside] = held
            elif inside.op == "placeholder":
                attribute = f"{path}.{next(names)}"
                tensor = tensors[attribute.removeprefix(f"{path}.")].detach()
                place = _after_state(specs)
                placeholders = gm.graph.find_nodes(op="placeholder")
                with gm.graph.inserting_before([*placeholders, first][place]):
                    added = gm.graph.placeholder(f"b_{attribute}".replace(".", "_"))
                added.meta["val"] = inside.meta["val"]
                argument = TensorArgument(name=added.name)
                specs.insert(place, InputSpec(InputKind.BUFFER, argument, attribute, True))
                state[attribute] = tensor
                inner[inside] = added
            elif inside.op == "output":
                (returned,) = inside.args[0]
                result = inner[returned]
                result.meta = dict(replaced.meta)
                replaced.replace_all_uses_with(result)
            else:
                with gm.graph.inserting_before(node):
                    inner[inside] = gm.graph.node_copy(inside, inner.__getitem__)
        for unread in (*node.users, node):
            gm.graph.erase_node(unread)
        result.name = result_name  # by which the signature knows it if it is returned
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


def _after_state(specs: list[InputSpec]) -> int:
    """Where in a signature the next buffer goes."""
    state_kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    return 1 + max((i for i, spec in enumerate(specs) if spec.kind in state_kinds), default=-1)


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
