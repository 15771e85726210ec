"""Nodes of graphs that may be lowered: linear layers, and lookups in tables."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.calls import Call, bind, is_view, operator_name
from fx_sparsity.graph.example_inputs import ExampleInputs, run_undisturbed
from fx_sparsity.graph.operators import (
    OPERATORS,
    RENORMALIZATIONS,
    SAME_VALUES,
    LinearForm,
    Operator,
)
from fx_sparsity.graph.sources import Source, exported_source, module_source
from fx_sparsity.graph.uses import SeenWeight, noted_weights, seen_weights
from fx_sparsity.lowering.layers import DenseLinear, read_torchao
from fx_sparsity.lowering.places import GraphPlace
from fx_sparsity.lowering.table_nodes import TableNode, held_by, indices_of, is_lookup
from fx_sparsity.verification.graph_reader import read_value
from fx_sparsity.verification.stored import StoredWeight, is_float


@dataclass(eq=False)
class NodePlace(GraphPlace):
    """A node that computes a linear layer.

    Attributes:
        operator: its row in the operator table.
        form: how it computes a linear layer.
    """

    operator: Operator = field(kw_only=True)
    form: LinearForm = field(kw_only=True)

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `GraphPlace`."""
        return (self.form.x,)

    @property
    def weight(self) -> fx.Node:
        """See `GraphPlace`."""
        node: fx.Node = bind(self.node)[self.form.weight]
        return node

    @property
    def transposed(self) -> bool:
        """See `Place`."""
        return self.form.transposed

    @property
    def view(self) -> SeenWeight | None:
        """See `Place`."""
        return None if self.seen.is_whole else self.seen

    def look(self) -> DenseLinear | str:
        """See `Place`."""
        args = bind(self.node)
        if any(args.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            return "its products are scaled"
        bias = self._bias(args)
        if isinstance(bias, str):
            return bias
        layer = self._weight(args[self.form.weight])
        if isinstance(layer, str):
            return layer
        if bias is not None and bias.shape != layer.weight.shape[:1]:
            return f"what is added to it has shape {tuple(bias.shape)}"
        return replace(layer, bias=bias, from_codes=_dequantized(args[self.form.x]))

    def _bias(self, args: Mapping[str, Any]) -> Tensor | str | None:
        value = args.get(self.operator.bias)
        if value is None:
            return None
        found = self.source(value) if isinstance(value, fx.Node) else None
        return "what is added to it is computed" if found is None else found[1].detach()

    def _weight(self, node: fx.Node) -> DenseLinear | str:
        found = self.source(node)
        if found is not None and not is_float(found[1]):
            return read_torchao(found[1])
        stored = read_value(self.source, self.seen, node)
        if stored.obstacle:
            return stored.obstacle
        data = stored.data if stored.view is not None else self.seen_part(stored)
        if data.ndim != 2:
            return f"its weight has {data.ndim} dimensions"
        weight = data.t() if self.form.transposed else data
        if stored.scale is None:
            return DenseLinear(weight.contiguous(), input_dtype=weight.dtype)
        return self._codes(stored, weight)

    def seen_part(self, stored: StoredWeight) -> Tensor:
        """What the node sees of a tensor that is stored as the weight itself."""
        return self.seen.of(stored.data)

    def _codes(self, stored: StoredWeight, weight: Tensor) -> DenseLinear | str:
        assert stored.scale is not None
        assert stored.zero_point is not None
        if weight.dtype != torch.int8 or bool(stored.zero_point.any()):
            return f"no kernel for {stored.dtype}, {stored.scheme}, with zero points"
        scale = stored.scale.float().expand(stored.data.shape)
        scale = scale if stored.view is not None else self.seen.of(scale)
        rows = scale.t() if self.form.transposed else scale
        if not bool((rows == rows[:, :1]).all()):
            return f"no kernel for {stored.scheme}: scales differ within an output"
        value = self.node.meta.get("val")
        dtype = value.dtype if isinstance(value, Tensor) else torch.float32
        return DenseLinear(weight.contiguous(), None, rows[:, 0].contiguous(), input_dtype=dtype)


def node_places(graph_module: fx.GraphModule) -> Iterator[GraphPlace]:
    """The nodes of a graph that may be lowered, with weights of the graph itself."""
    yield from places_by(graph_module, module_source(graph_module))


def watch_nodes(
    graph_module: fx.GraphModule, places: Sequence[GraphPlace], example_inputs: ExampleInputs
) -> None:
    """Run a graph on its example inputs, and note the inputs of places where nothing tells them.

    What a trace, or a quantizer, adds to a graph has no values noted.

    Raises:
        InputError: the graph rejects the inputs.
    """
    unknown = [place for place in places if not place.tokens]
    if not unknown:
        return
    graph = copy.deepcopy(graph_module.graph)
    copies = dict(zip(graph_module.graph.nodes, graph.nodes, strict=True))
    for place in unknown:
        with graph.inserting_before(copies[place.node]):
            x = copies[bind(place.node)[place.inputs[0]]]
            graph.call_function(_noting(place), (x,))
    run_undisturbed(fx.GraphModule(graph_module, graph), example_inputs)


def _noting(place: GraphPlace) -> Callable[[Tensor], None]:
    def note(x: Tensor) -> None:
        place.tokens.add(prod(x.shape[:-1] if isinstance(place, NodePlace) else x.shape))
        place.dtypes.add(x.dtype)

    return note


def program_places(program: ExportedProgram) -> Iterator[GraphPlace]:
    """The nodes of a program that may be lowered."""
    yield from places_by(program.graph_module, exported_source(program))


def places_by(graph_module: fx.GraphModule, source: Source) -> Iterator[GraphPlace]:
    """The nodes of a graph that may be lowered, with the weights that `source` tells."""
    written = set(_written(graph_module.graph, source))
    for node, arg, seen in seen_weights(graph_module, source):
        row, args = OPERATORS[operator_name(node)], bind(node)
        form = row.linear if row.linear is not None and arg == row.linear.weight else None
        if form is None and not is_lookup(node):
            continue
        x = args[indices_of(args) if form is None else form.x]
        if not isinstance(x, fx.Node):
            continue
        value = x.meta.get("val", x.meta.get("example_value"))
        noted = noted_weights(node).get(arg)
        names = (seen.fqn,) if noted is None else (noted.fqn, seen.fqn)
        common: dict[str, Any] = {"node": node, "seen": seen, "source": source}
        if isinstance(value, Tensor):
            sizes = value.shape if form is None else value.shape[:-1]
            common |= {"tokens": {_product(sizes)}, "dtypes": {value.dtype}}
        held = held_by(source, args[arg])
        if held is not None and held[0] in written:
            common["obstacle"] = "the graph writes to it, as lookups with max_norm do"
        if form is None:
            yield TableNode.of(names, args[arg], **common)
        else:
            held = source(args[arg])
            tensor = held[1] if held is not None else seen
            yield NodePlace(names, nn.Linear, tensor, operator=row, form=form, **common)


def _written(graph: fx.Graph, source: Source) -> Iterator[str]:
    """Names of the weights that a graph changes, in place or into a new tensor."""
    for node in graph.nodes:
        call = Call(node)
        target = node.args[0] if call.name in RENORMALIZATIONS else call.written
        while target is not None and source(target) is None:
            target = Call(target).base
        if target is not None and (held := source(target)) is not None:
            yield held[0]


def _dequantized(node: fx.Node) -> bool:
    """Whether a node gives what codes stand for, in any shape or dtype."""
    while node.op != "placeholder" and not operator_name(node).startswith("dequantize"):
        if not (is_view(node) or operator_name(node) in SAME_VALUES) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return node.op != "placeholder"


def _product(sizes: torch.Size) -> int:
    """By the hints of sizes that are dynamic."""
    return prod(size if isinstance(size, int) else size.node.hint or 1 for size in sizes)
