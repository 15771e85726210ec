"""Lowering of graphs without modules: nodes that compute linear layers are rewritten."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fx_sparsity.graph.calls import bind, is_view, operator_name
from fx_sparsity.graph.operators import OPERATORS, SAME_VALUES, LinearForm, Operator
from fx_sparsity.graph.program_editor import replace_nodes
from fx_sparsity.graph.sources import Source, exported_source, module_source
from fx_sparsity.graph.uses import SeenWeight, noted_weights, seen_weights
from fx_sparsity.lowering.layers import DenseLinear, read_torchao
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.lowering.places import Place
from fx_sparsity.verification.graph_reader import read_value
from fx_sparsity.verification.stored import StoredWeight, is_float

KERNELS = "fx_sparsity_kernels"
"""Submodule of a rewritten GraphModule that holds the packed layers, by the names of weights."""


@dataclass(eq=False)
class NodePlace(Place):
    """A node that computes a linear layer.

    Attributes:
        node: the node.
        operator: its row in the operator table.
        form: how it computes a linear layer.
        seen: what it sees of the weight.
        source: tells the tensors that nodes stand for.
    """

    node: fx.Node = field(kw_only=True)
    operator: Operator = field(kw_only=True)
    form: LinearForm = field(kw_only=True)
    seen: SeenWeight = field(kw_only=True)
    source: Source = field(kw_only=True)

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


def node_places(graph_module: fx.GraphModule) -> Iterator[NodePlace]:
    """The nodes of a graph that compute a linear layer with weights of the graph itself."""
    yield from places_by(graph_module, module_source(graph_module))


def program_places(program: ExportedProgram) -> Iterator[NodePlace]:
    """The nodes of a program that compute a linear layer."""
    yield from places_by(program.graph_module, exported_source(program))


def places_by(graph_module: fx.GraphModule, source: Source) -> Iterator[NodePlace]:
    """The nodes of a graph that compute a linear layer, with the weights that `source` tells."""
    for node, arg, seen in seen_weights(graph_module, source):
        row, args = OPERATORS[operator_name(node)], bind(node)
        form = row.linear
        if form is None or arg != form.weight or not isinstance(args[form.x], fx.Node):
            continue
        x = args[form.x]
        value = x.meta.get("val", x.meta.get("example_value"))
        known = isinstance(value, Tensor)
        tokens = {_tokens(value)} if known else set()
        dtypes = {value.dtype} if known else set()
        held = source(args[form.weight])
        tensor = held[1] if held is not None else seen
        noted = noted_weights(node).get(arg)
        yield NodePlace(
            (seen.fqn,) if noted is None else (noted.fqn, seen.fqn),
            nn.Linear,
            tensor,
            "",
            tokens,
            dtypes,
            node=node,
            operator=row,
            form=form,
            seen=seen,
            source=source,
        )


def _dequantized(node: fx.Node) -> bool:
    """Whether a node gives what codes stand for, in any shape or dtype."""
    while node.op != "placeholder" and not operator_name(node).startswith("dequantize"):
        if not (is_view(node) or operator_name(node) in SAME_VALUES) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return node.op != "placeholder"


def _tokens(x: Tensor) -> int:
    """Rows of activations, by the hints of sizes that are dynamic."""
    return prod(size if isinstance(size, int) else size.node.hint or 1 for size in x.shape[:-1])


class LowerNodes(PassBase):
    """Call a packed layer in the place of each node; weights that nothing reads any more go.

    Args:
        packed: place in the graph -> the layer.
    """

    def __init__(self, packed: Mapping[NodePlace, LoweredLinear]) -> None:
        super().__init__()
        self.packed = packed

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        graph = graph_module.graph
        read = set(_attributes(graph))
        taken = {name for name, _ in graph_module.named_modules()}
        for (place, layer), name in zip(
            self.packed.items(), _names(self.packed, taken), strict=True
        ):
            graph_module.add_submodule(name, layer)
            with graph.inserting_before(place.node):
                # Asked for now: where the layer before was lowered, it is another node by then.
                new = graph.call_module(name, (bind(place.node)[place.form.x],))
            new.meta = dict(place.node.meta)
            place.node.replace_all_uses_with(new)
            graph.erase_node(place.node)
        graph.eliminate_dead_code()
        for fqn in read - set(_attributes(graph)):
            owner, _, attribute = fqn.rpartition(".")
            delattr(graph_module.get_submodule(owner), attribute)
        graph_module.recompile()
        return PassResult(graph_module, bool(self.packed))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well-formed."""
        graph_module.graph.lint()


def lower_program(
    program: ExportedProgram, packed: Mapping[NodePlace, LoweredLinear]
) -> ExportedProgram:
    """A program with the operators of packed layers in the place of nodes; `program` stays."""
    taken = {name.rpartition(".")[0] for name in (*program.state_dict, *program.constants)}
    calls = {
        place.node.name: (name, layer, place.form.x)
        for (place, layer), name in zip(packed.items(), _names(packed, taken), strict=True)
    }
    return replace_nodes(program, calls)


def _names(packed: Iterable[NodePlace], taken: set[str]) -> Iterator[str]:
    """Paths for packed layers, by the weights they stand for; `__1` and so on for further ones."""
    taken = set(taken)
    for place in packed:
        first = f"{KERNELS}.{place.fqn}"
        name = next(n for i in count() if (n := f"{first}__{i}" if i else first) not in taken)
        taken.add(name)
        yield name


def _attributes(graph: fx.Graph) -> Iterator[str]:
    return (str(node.target) for node in graph.find_nodes(op="get_attr"))
