"""Which nodes of a graph consume which parameters, and as what."""

import operator
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fx_sparsity.graph.calls import Call, bind, looks_up_bias, operator_name, shape_of, writes
from fx_sparsity.graph.compiled import returned
from fx_sparsity.graph.operators import (
    ADDITIONS,
    MODULES,
    NORMALIZATIONS,
    OPERATORS,
    PRODUCTS,
    SCORING,
    Axes,
)
from fx_sparsity.graph.origins import (
    Origin,
    origin_of,
    reordered_dimensions,
    roles_of_parameter,
    slice_of_parameter,
)
from fx_sparsity.graph.provenance import follow, mixed, reduced_by
from fx_sparsity.graph.sources import Source, module_source
from fx_sparsity.graph.weight_map import Reason, Use
from fx_sparsity.graph.writes import Memory

_CUSTOM, _WEIGHTS = "custom", "fx_sparsity_weights"
"""Keys in `node.meta`: where torch keeps what others note, through export and files too, and in it
argument name -> the `SeenWeight` that it receives, as JSON has it."""


class Consumption(NamedTuple):
    """One node that consumes a tensor.

    Attributes:
        call: of the consumer.
        arg: name of its argument; empty where the operator's row has no place for it.
        origin: what arrives there.
        axes: roles of the argument's axes; None for a bias, and where the row has no place for it.
        constant: whether the node is the same for all inputs of the model, or the tensor but a
            factor of what arrives there, in a product of constants.
    """

    call: Call
    arg: str
    origin: Origin
    axes: Axes | None
    constant: bool

    @property
    def node(self) -> fx.Node:
        """The consumer."""
        return self.call.node

    def use(self) -> Use | None:
        """The roles that the parameter has here; None where it has none."""
        if self.axes is None or self.origin.through or not isinstance(self.origin.view, Tensor):
            return None
        if self.call.looks_up and looks_up_bias(self.node):
            return None
        roles = roles_of_parameter(self.origin, self.axes)
        if roles is None:
            return None
        return Use(
            self.call.name,
            self.node.name,
            self.arg,
            roles,
            slice_of_parameter(self.origin),
            reordered_dimensions(self.origin),
            self.origin.moved_by,
        )

    def reason(self) -> tuple[Reason, str]:
        """Why the parameter is no weight here, and the operator concerned."""
        name = self.call.name
        if self.axes is None and (reduced := reduced_by(self.call, self.origin)):
            return Reason.OPERATOR, f"{name}, then {reduced}"
        if looks_up_bias(self.node) or (self.axes is None and (name in ADDITIONS or self.arg)):
            return Reason.ADDED, self.origin.through or ""
        if self.axes is None and (name in NORMALIZATIONS or self.call.elementwise):
            return Reason.SCALE, name
        return Reason.OPERATOR, self.origin.through or name


def weight_uses(graph: fx.Graph, source: Source) -> Iterator[Consumption]:
    """Every consumption of a tensor that `source` knows, in graph order."""
    seeds: dict[fx.Node, list[Origin]] = {}
    inputs: set[fx.Node] = set()
    for node in graph.nodes:
        if (found := source(node)) is not None:
            seeds[node] = [origin_of(*found)]
        elif node.op == "placeholder":
            inputs.add(node)
    yield from _uses(graph, seeds, inputs)  # what the graph returns of them matters to no one


class Step(NamedTuple):
    """An `as_strided` of a contiguous tensor of `shape`."""

    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class SeenWeight:
    """What a consumer sees of a weight.

    Attributes:
        fqn: canonical name of the weight.
        steps: from the weight itself to what is seen; where more than one, each starts from a
            contiguous copy of what the one before gives.
    """

    fqn: str
    steps: tuple[Step, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight itself."""
        return self.steps[0].shape

    @property
    def size(self) -> tuple[int, ...]:
        """Of what is seen."""
        return self.steps[-1].size

    def of(self, whole: Tensor) -> Tensor:
        """What is seen of a tensor of the weight's shape."""
        for step in self.steps:
            whole = whole.contiguous().view(step.shape)
            whole = whole.as_strided(step.size, step.stride, step.offset)
        return whole

    @property
    def is_whole(self) -> bool:
        """Whether the weight is seen just as it is."""
        stride = torch.empty(self.shape, device="meta").stride()
        return all(step == (self.shape, self.shape, stride, 0) for step in self.steps)


def note_weight(node: fx.Node, arg: str, weight: SeenWeight) -> None:
    """Note on a node which weight an argument receives; what is noted already stays."""
    custom = node.meta.get(_CUSTOM, {})
    plain = {"fqn": weight.fqn, "steps": [[*map(_plain, step)] for step in weight.steps]}
    # Nodes may share these dicts: retracing hands them on as they are.
    node.meta[_CUSTOM] = {**custom, _WEIGHTS: {arg: plain, **custom.get(_WEIGHTS, {})}}


def noted_weights(node: fx.Node) -> dict[str, SeenWeight]:
    """Argument name -> weight, as `note_weight` noted it."""
    noted = node.meta.get(_CUSTOM, {}).get(_WEIGHTS, {})
    return {
        arg: SeenWeight(plain["fqn"], tuple(Step(*map(_tupled, step)) for step in plain["steps"]))
        for arg, plain in noted.items()
    }


def _plain(extent: Any) -> Any:
    return [*extent] if isinstance(extent, tuple) else extent


def _tupled(extent: Any) -> Any:
    return tuple(extent) if isinstance(extent, list) else extent


def _steps(origin: Origin) -> tuple[Step, ...]:
    """The views that lead to an origin, first the one of the weight itself."""
    before = () if origin.before is None else _steps(origin.before)
    step = Step(
        tuple(origin.parameter.shape),
        tuple(origin.view.shape),
        tuple(origin.view.stride()),
        int(origin.view.storage_offset()),
    )
    return (*before, step)


def seen_weights(
    graph_module: fx.GraphModule, source: Source | None = None
) -> Iterator[tuple[fx.Node, str, SeenWeight]]:
    """(consumer, name of its argument, what it sees) of every weight that a graph reads.

    A weight goes by the name that `source` gives; by that of the attribute that is read by default.
    """
    for found in weight_uses(graph_module.graph, source or module_source(graph_module)):
        if found.origin.exact and found.use() is not None:
            fqn = canonical_fqn(found.origin.fqn)
            yield found.node, found.arg, SeenWeight(fqn, _steps(found.origin))


def weight_arguments(
    node: fx.Node, noted: Mapping[str, SeenWeight] | None = None
) -> Iterator[tuple[SeenWeight, fx.Node]]:
    """(weight, the node it receives now) of every weight of a node.

    What an operator was decomposed into has its notes, though the arguments have other names: a
    single weight is then the one argument that does not depend on the inputs.

    Args:
        node: that consumes weights.
        noted: argument name -> weight; what `AnnotateWeights` noted on `node` by default.
    """
    noted = noted_weights(node) if noted is None else noted
    row = OPERATORS.get(operator_name(node)) if noted else None
    places = {
        arg: value
        for arg, value, _ in (row.find(bind(node)) if row else ())
        if isinstance(value, fx.Node)
    }
    if len(noted) == 1 and noted.keys().isdisjoint(places):
        (weight,) = noted.values()
        values = [value for value in places.values() if _is_constant(value)]
        if len(values) == 1:
            yield weight, values[0]
    for arg, value in places.items():
        if arg in noted:
            yield noted[arg], value


def _is_constant(node: fx.Node) -> bool:
    """Whether a node is computed from tensors of the model alone."""
    pending, seen = [node], {node}
    while pending:
        found = pending.pop()
        if found.op == "placeholder":
            return False
        pending += [value for value in found.all_input_nodes if value not in seen]
        seen.update(found.all_input_nodes)
    return True


def is_annotated(graph: fx.Graph) -> bool:
    """Whether nodes that consume weights say which."""
    return any(True for node in graph.nodes for _ in weight_arguments(node))


def module_uses(graph: fx.Graph, model: Any) -> Iterator[tuple[str, str, Use]]:
    """(FQN, kind, use) of every weight of the modules that a graph calls as a whole."""
    live = live_nodes(graph)
    for node in graph.nodes:
        if node.op == "call_module" and node in live:
            yield from uses_of_module(node.target, model.get_submodule(node.target), node.name)


def uses_of_module(path: str, module: nn.Module, node: str = "") -> Iterator[tuple[str, str, Use]]:
    """(FQN, kind, use) of the weights of one module, by its class; nothing for unknown classes.

    A sequence called as a whole, such as a quantizer's fused modules, calls its members.
    """
    if node and isinstance(module, nn.Sequential):
        for name, member in module.named_children():
            yield from uses_of_module(f"{path}.{name}", member, node)
    row = next((row for base, row in MODULES.items() if isinstance(module, base)), None)
    for name, parameter in module.named_parameters(prefix=path) if row else ():
        attribute = canonical_fqn(name).rpartition(".")[2]
        if parameter.ndim >= 2 and (attribute.startswith("weight") or "_weight" in attribute):
            kind, axes = row  # type: ignore[misc]
            rest = axes.get(None, "batch")
            roles = tuple(axes.get(dim, rest) for dim in range(parameter.ndim))
            arg = canonical_fqn(name).removeprefix(f"{path}.")
            yield name, kind, Use(kind, node, arg, roles)


def canonical_fqn(fqn: str) -> str:
    """The name that a tensor has without its parametrization."""
    head, marker, tail = fqn.rpartition("parametrizations.")
    return head + tail.removesuffix(".original") if marker and tail.endswith(".original") else fqn


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a result depends on; writing into a tensor counts as reaching one."""
    live: set[fx.Node] = set()
    pending = [*returned(graph), *filter(writes, graph.nodes)]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += node.all_input_nodes
    return live


def _uses(
    graph: fx.Graph, seeds: Mapping[fx.Node, list[Origin]], inputs: set[fx.Node]
) -> Generator[Consumption, None, list[list[Origin]]]:
    """Walk a graph, given what its first nodes hold and which of them depend on the inputs.

    Returns:
        What the graph passes on in each of its results.
    """
    live = live_nodes(graph)
    origins: dict[fx.Node, list[Origin]] = {**seeds}
    dependent = set(inputs)
    results: dict[fx.Node, list[list[Origin]]] = {}
    memory = Memory()
    for node in graph.nodes:
        call = Call(node)
        root = memory.note(call)
        if root is not node and node.op == "get_attr":
            origins[node] = list(origins.get(root, ()))
        if node.target is operator.getitem and node.args[0] in results:
            passed_out = results[node.args[0]]
            origins[node] = passed_out[i] if (i := node.args[1]) < len(passed_out) else []
        received = [value for value in node.all_input_nodes if value in origins]
        constant = dependent.isdisjoint([root, *call.read])
        if not constant:
            dependent.add(node)
        if received and _observes(node):
            origins[node] = list(origins[received[0]])
        elif node.op in ("call_function", "call_method") and received and node in live:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                results[node] = yield from _inside(node, origins, dependent)
                if node.target.name() in SCORING:
                    for value in received:
                        for origin in origins[value]:
                            yield Consumption(call, "", origin, None, constant)
            else:
                yield from _consumed(call, received, origins, constant)
        if call.written is not None:
            yield from _write(call, memory, seeds, origins, dependent)
    (returned,) = graph.output_node().args
    values = returned if isinstance(returned, list | tuple) else [returned]
    return [list(origins.get(v, ())) if isinstance(v, fx.Node) else [] for v in values]


def _consumed(
    call: Call, received: list[fx.Node], origins: dict[fx.Node, list[Origin]], constant: bool
) -> Iterator[Consumption]:
    """What an operator consumes of what it receives; what it passes on is added to `origins`."""
    passed = list(follow(call, origins, constant))
    origins.setdefault(call.node, []).extend(origin for _, origin in passed)
    settled = {value for value, _ in passed}
    if constant and (call.looks_up or call.name in PRODUCTS):
        settled = set()  # should nothing else come of it, this is what it is used for
    row, arguments = call.row, call.args
    for arg, value, axes in row.find(arguments) if row and arguments else ():
        if isinstance(value, fx.Node) and value in origins and value not in settled:
            settled.add(value)
            for origin in origins[value]:
                yield Consumption(call, arg, origin, axes, constant or origin.is_factor)
    bias = arguments.get(row.bias) if row else None
    for value in received:
        for origin in origins[value] if value not in settled else ():
            if constant and not call.elementwise:
                # Nothing is decided yet: what matters is who consumes the result.
                origins[call.node].append(mixed(call, origin))
            else:
                arg = row.bias if row and value is bias else ""
                yield Consumption(call, arg, origin, None, constant)


def _write(
    call: Call,
    memory: Memory,
    seeds: Mapping[fx.Node, list[Origin]],
    origins: dict[fx.Node, list[Origin]],
    dependent: set[fx.Node],
) -> Iterator[Consumption]:
    """A write in place: all views of what it changes hold what is written from then on."""
    if call.node not in dependent:
        memory.spread(call, origins)
        return
    root = memory.root(call.node)
    held = origins.get(root, [])
    for shown in memory.shown(root):
        # A parameter that is overwritten for good is no activation, but what it is is not known.
        origins[shown] = [mixed(call, origin) for origin in held] if root in seeds else []
    dependent.update(memory.shown(root))
    if root not in seeds:
        for origin in held:
            yield Consumption(call, "", origin, None, False)


def _observes(node: fx.Node) -> bool:
    """Whether a node calls a quantizer's observer or fake quantization, which pass on their input.

    torch's and torchao's classes have no base in common but this method.
    """
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return False
    return hasattr(owner.get_submodule(str(node.target)), "calculate_qparams")


def _inside(
    node: fx.Node, origins: Mapping[fx.Node, list[Origin]], dependent: set[fx.Node]
) -> Generator[Consumption, None, list[list[Origin]]]:
    """Uses within the subgraphs of a higher-order operator, such as `torch.cond`.

    The operator's arguments end with the operands, which the subgraphs take as placeholders.

    Returns:
        What any of the subgraphs passes on in each of its results.
    """
    flat = pytree.tree_leaves((node.args, node.kwargs))
    results: list[list[Origin]] = []
    if node.target.name() in SCORING:  # type: ignore[union-attr]
        return results
    for body in _bodies(node.graph.owning_module, flat):
        placeholders = body.graph.find_nodes(op="placeholder")
        operands = flat[len(flat) - len(placeholders) :]
        pairs = list(zip(placeholders, operands, strict=False))
        seeds = {
            p: [entered for origin in origins[o] if (entered := _enter(p, origin)) is not None]
            for p, o in pairs
            if isinstance(o, fx.Node) and o in origins
        }
        passed = yield from _uses(body.graph, seeds, {p for p, o in pairs if o in dependent})
        pieces = zip_longest(results, passed, fillvalue=())
        results = [[*before, *here] for before, here in pieces]
    return results


def _enter(placeholder: fx.Node, origin: Origin) -> Origin | None:
    """What a subgraph receives of a tensor: all of it, or slice after slice, as in a map."""
    shape = shape_of(placeholder)
    if origin.through or shape is None or shape == origin.view.shape:
        return origin
    return replace(origin, view=origin.view[0]) if shape == origin.view.shape[1:] else None


def _bodies(owner: fx.GraphModule | None, arguments: list[Any]) -> Iterator[fx.GraphModule]:
    """The subgraphs among the arguments of a higher-order operator."""
    for argument in arguments:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            body = getattr(owner, str(argument.target), None)
            if isinstance(body, fx.GraphModule):
                yield body
