"""Walks batches through a graph, and stops wherever all inputs of a weight are known."""

import copy
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fx_sparsity.graph.calls import (
    bind,
    is_lookup,
    is_view,
    writes,
)
from fx_sparsity.graph.context_blocks import run_node
from fx_sparsity.graph.operators import (
    OPERATORS,
)
from fx_sparsity.graph.sources import module_source
from fx_sparsity.graph.uses import canonical_fqn, live_nodes
from fx_sparsity.graph.weight_inputs import UnsupportedUse, WeightInputs
from fx_sparsity.pruning.batches import Batch, GraphUse
from fx_sparsity.pruning.columns import Columns
from fx_sparsity.pruning.graph_blocks import Block, graph_blocks
from fx_sparsity.pruning.offload import Keep, in_memory
from fx_sparsity.pruning.padding import Padding, without_padding
from fx_sparsity.pruning.routing import Routing, Value, find_routing

Read = Callable[[str, Tensor], Tensor]
"""(FQN, tensor of the graph) -> its value now."""
Take = Callable[[str, WeightInputs, bool], None]
"""(FQN, inputs of that weight, whether their batch is held out) -> nothing."""
Note = Callable[[str, str], None]
"""(FQN, what the report is to say of that weight; empty for nothing) -> nothing."""
_DECODER_INPUTS = ("decoder_", "labels")
Refuse = Callable[[str, str], None]
"""(FQN, why the inputs of that weight cannot be known) -> nothing."""


class Walk:
    """Batches on their way through one graph.

    Every batch runs from one stop to the next before the others follow. What lives at a time is
    what crosses a stop, of all batches, and what lies between two stops, of one.

    Args:
        graph: of an exported program.
        batches: that it takes.
        uses: of the weights that are wanted, in this graph.
        named: every name of a weight -> its FQN.
        columns: FQN -> the column of every element of the weight (`MatrixForm.columns`).
        read: gives tensors of the model.
        take: receives inputs of the weights.
        refuse: called for a weight whose inputs cannot be known.
        note: called with what the report is to say of a weight, if anything.
        all_experts: whether experts take the inputs that all tokens would be to them.
        keep: keeps values at stops.
        in_blocks: whether it also goes from block to block, see `enter`.

    Attributes:
        order: FQNs of the weights in the order in which they are complete.
        blocks: of the graph, in its order; none where it does not go from one to the next.
        is_routed: whether a router decides on the inputs of some of them.
        peak: the most bytes that activations of all batches took at a stop.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        batches: Sequence[Batch],
        uses: Sequence[GraphUse],
        named: Mapping[str, str],
        columns: Callable[[str], Tensor],
        read: Read,
        take: Take,
        refuse: Refuse,
        note: Note,
        keep: Keep = in_memory,
        all_experts: bool = False,
        in_blocks: bool = False,
    ) -> None:
        self._graph, self.batches, self._named = graph, batches, named
        self._read, self._take, self._refuse = read, take, refuse
        self._note, self.keep, self._all_experts = note, keep, all_experts
        self._source = module_source(graph)
        self._columns = Columns(self._source, named, columns)
        live = live_nodes(graph.graph)
        nodes = [node for node in graph.graph.nodes if node in live]
        last = {use.fqn: use.node for use in uses}
        self._stops: dict[fx.Node, list[str]] = {}
        for fqn, node in last.items():
            self._stops.setdefault(node, []).append(fqn)
        places = [i for i, node in enumerate(nodes) if node in self._stops]
        self.order = [fqn for i in places for fqn in self._stops[nodes[i]]]
        self._places = {fqn: i for i in places for fqn in self._stops[nodes[i]]}
        body = [node for node in nodes if node.op != "output"]
        self.blocks = graph_blocks(body, self._stops) if in_blocks and places else []
        ends = [place + 1 for place in places[-1:]] + [block.end for block in self.blocks[-1:]]
        self._nodes = nodes[: max(ends, default=0)]  # what follows uses no weight
        self._uses: dict[fx.Node, list[GraphUse]] = {}
        for use in uses:
            self._uses.setdefault(use.node, []).append(use)
        self._fixed = _of_state_alone(self._nodes)
        self._of_decoder = _dependents(self._nodes, graph.graph, _DECODER_INPUTS)
        self._state: dict[fx.Node, Any] = {}
        self._at, self._taken = 0, True
        self._followed: dict[GraphUse, Tensor] = {}
        self.peak = 0
        self._routings = self._find_routings(columns)
        self.is_routed = bool(self._routings)
        self._dying = _last_uses(self._nodes, self._fixed, self._read_late())
        inputs = graph.graph.find_nodes(op="placeholder")
        self._values: list[dict[fx.Node, Any]] = [
            dict(zip(inputs, batch.leaves, strict=True)) for batch in batches
        ]

    def advance(self, fqn: str) -> None:
        """Go on until all inputs of a weight are taken, to right before its last use."""
        self._go_to(self._places[fqn], take=True)

    def block_of(self, fqn: str) -> Block | None:
        """The block in which a weight has its last use."""
        place = self._places[fqn]
        return next((block for block in self.blocks if block.start <= place < block.end), None)

    def enter(self, block: Block) -> list[dict[fx.Node, Any]]:
        """Go on to the beginning of a block; what lives there, of each batch."""
        self._go_to(block.start, take=False)
        return self._own_values(block.in_place)

    def leave(self, block: Block, entered: Sequence[Mapping[fx.Node, Any]]) -> None:
        """Go on to the end of a block, from its beginning, with its weights as they are now.

        Args:
            block: which.
            entered: what `enter` returned.
        """
        self._values = [dict(values) for values in entered]
        self._state.clear()
        for values in self._values:
            self._pass(block.start, block.end, values, self._state, self._read)
            values.update(self.keep(values))
        self._at, self._taken = block.end, False

    def outputs(
        self, block: Block, entered: Mapping[fx.Node, Any], read: Read | None = None
    ) -> list[Tensor]:
        """What a block gives out of one batch.

        Args:
            block: which.
            entered: what lives at its beginning; not changed.
            read: gives tensors of the model; as the walk reads them by default.
        """
        values = _copied(entered) if block.in_place else dict(entered)
        kept = self._pass(block.start, block.end, values, {}, read or self._read, block.outputs)
        return [kept[node] for node in block.outputs]

    def begin(self) -> list[dict[fx.Node, Any]]:
        """What lives at the very beginning, of each batch, for `run_on`."""
        return self._own_values(any(block.in_place for block in self.blocks))

    def run_on(self, start: int, block: Block, values: dict[fx.Node, Any]) -> list[Tensor]:
        """Take values of one's own from a place to the end of a block; what the block gives out."""
        kept = self._pass(start, block.end, values, {}, self._read, block.outputs)
        values.update(self.keep(values))
        return [kept[node] for node in block.outputs]

    def is_of_decoder(self, node: fx.Node) -> bool:
        """Whether a value depends on what a decoder is given."""
        return node in self._of_decoder

    def parameters(self, block: Block) -> dict[str, Tensor]:
        """Name -> parameter of what a block alone computes with."""
        inside = set(self._nodes[block.start : block.end])
        found: dict[str, Tensor] = {}
        elsewhere: set[str] = set()
        for node in self._graph.graph.nodes:
            held = self._source(node)
            if held is None or not isinstance(held[1], nn.Parameter):
                continue
            name = canonical_fqn(held[0])
            name = self._named.get(name, name)
            readers = list(self._readers(node))
            if not inside.issuperset(readers):
                elsewhere.add(name)
            elif readers:
                found[name] = held[1]
        return {name: tensor for name, tensor in found.items() if name not in elsewhere}

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Nodes that read what follows from a tensor of the model, and from others of it."""
        for user in node.users:
            if user in self._fixed:
                yield from self._readers(user)
            else:
                yield user

    def _own_values(self, in_place: bool) -> list[dict[fx.Node, Any]]:
        """What lives now, of each batch, to go on from; `in_place`: with writes into it."""
        return [self.keep(_copied(values)) if in_place else dict(values) for values in self._values]

    def _go_to(self, stop: int, take: bool) -> None:
        """Run every batch to a place; `take` the inputs of what stands there, too."""
        if (stop, take) <= (self._at, self._taken):
            return
        for batch, values in zip(self.batches, self._values, strict=True):
            self._run(self._at, stop, batch, values, take)
            values.update(self.keep(values))
        self._at, self._taken = stop, take
        self._state.clear()
        self.peak = max(self.peak, self._held())

    def _find_routings(self, columns: Callable[[str], Tensor]) -> dict[fx.Node, Routing]:
        """Consumer -> how its experts get their tokens."""
        order = {node: place for place, node in enumerate(self._nodes)}
        found = {}
        for node, uses in self._uses.items():
            for use in uses:
                weight = _argument(bind(node), use.use.arg)
                if "batch" in use.use.roles and isinstance(weight, fx.Node):
                    routing = find_routing(node, weight, order, self._fixed)
                    if routing is not None and routing.experts in columns(use.fqn).shape:
                        found[node] = routing
        return found

    def _read_late(self) -> dict[fx.Node, set[fx.Node]]:
        """Consumer -> what tells of its inputs, besides its arguments."""
        late: dict[fx.Node, set[fx.Node]] = {}
        for node, uses in self._uses.items():
            read = late.setdefault(node, set())
            pending = [_argument(bind(node), use.use.arg) for use in uses]
            while pending:  # what picks a weight, such as an index
                value = pending.pop()
                if isinstance(value, fx.Node) and value not in self._fixed and value not in read:
                    read.update(value.all_input_nodes)
                    pending += value.args[:1] if is_view(value) or is_lookup(value) else []
            if node in self._routings:
                read.update(self._routings[node].sources)
        return late

    def _held(self) -> int:
        """Bytes that values take now, those of views once."""
        held = pytree.tree_leaves([list(values.values()) for values in self._values])
        storages = (leaf.untyped_storage() for leaf in held if isinstance(leaf, Tensor))
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def _run(
        self, start: int, stop: int, batch: Batch, values: dict[fx.Node, Any], take: bool
    ) -> None:
        """Take one batch from a place, whose node may have taken its inputs, to a later one."""

        def value(node: fx.Node) -> Any:
            return values[node] if node in values else self._of_state(node)

        for position in range(start, stop + 1):
            node = self._nodes[position]
            try:
                if (position > start or not self._taken) and (position < stop or take):
                    for use in self._uses.get(node, ()):
                        self._collect(use, value, batch)
                if position < stop:
                    self._pass(position, position + 1, values, self._state, self._read)
            except Exception as error:
                error.add_note(f"at {node.name}, in batch {batch.number} of the calibration data")
                raise

    def _pass(
        self,
        start: int,
        end: int,
        values: dict[fx.Node, Any],
        state: dict[fx.Node, Any],
        read: Read,
        wanted: Collection[fx.Node] = (),
    ) -> dict[fx.Node, Any]:
        """Compute nodes, and drop the values that no later one needs; returns those wanted."""

        def value(node: fx.Node) -> Any:
            return values[node] if node in values else self._of_state(node, state, read)

        kept: dict[fx.Node, Any] = {}
        for node in self._nodes[start:end]:
            if node.op == "call_function" and node not in self._fixed:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                values[node] = run_node(node, args, kwargs)
            if node in wanted:
                kept[node] = value(node)
            for dead in self._dying.get(node, ()):
                values.pop(dead, None)
        return kept

    def _of_state(
        self, node: fx.Node, state: dict[fx.Node, Any] | None = None, read: Read | None = None
    ) -> Any:
        """A value that follows from the model's tensors alone, as they are now."""
        state = self._state if state is None else state
        read = self._read if read is None else read
        if node not in state:
            found = self._source(node)
            if found is not None:
                name = canonical_fqn(found[0])
                state[node] = read(self._named.get(name, name), found[1])
            elif node.op == "get_attr":
                state[node] = operator.attrgetter(str(node.target))(self._graph)
            else:
                args, kwargs = fx.map_arg(
                    (node.args, node.kwargs), lambda inner: self._of_state(inner, state, read)
                )
                state[node] = run_node(node, args, kwargs)
        return state[node]

    def _collect(self, use: GraphUse, value: Value, batch: Batch) -> None:
        """Take the inputs that a weight has in one use."""
        decoder = use.node in self._of_decoder
        routing = self._routings.get(use.node)
        try:
            if routing is None or not (self._all_experts or batch.padding.keep):
                self._take_all(use, self._inputs(use, value, batch.padding, decoder), batch)
                return
            marked = routing.marked(value, batch.padding, decoder)
            self._collect_routed(use, value, routing, marked, batch)
        except UnsupportedUse as reason:
            self._refuse(use.fqn, str(reason))

    def _collect_routed(
        self,
        use: GraphUse,
        value: Value,
        routing: Routing,
        marked: dict[fx.Node, Tensor],
        batch: Batch,
    ) -> None:
        """Take the inputs of experts, without what is marked."""
        decoder = use.node in self._of_decoder
        for turn in routing.turns(value, self._all_experts, marked):
            padding = Padding({}) if marked else batch.padding
            found = self._inputs(use, turn, padding, decoder)
            if marked:
                rest = routing.without_marked(list(found), value, marked)
                if rest is None:  # of the first turn, since all sort tokens alike
                    self._collect_routed(use, value, routing, {}, batch)
                    return
                found = iter(rest)
            self._take_all(use, found, batch)

    def _take_all(self, use: GraphUse, found: Iterable[WeightInputs], batch: Batch) -> None:
        for inputs in found:
            if use.use.reordered:
                _check_distinct(inputs.columns)
            self._take(use.fqn, inputs, batch.held_out)

    def _inputs(
        self, use: GraphUse, value: Value, padding: Padding, decoder: bool
    ) -> Iterator[WeightInputs]:
        """The inputs of a weight in one use.

        Raises:
            UnsupportedUse: they cannot be known.
        """
        bound = bind(use.node)
        weight = _argument(bound, use.use.arg)
        columns = self._followed.get(use)
        if columns is None:
            columns = self._columns.follow(weight, use.fqn, value)
            if columns is None:
                raise UnsupportedUse(f"which of its columns {use.use.op} reads is not known")
            if weight in self._fixed:
                self._followed[use] = columns
        row = OPERATORS[use.use.op]
        assert row.inputs is not None  # no other weight has a plan
        whole = fx.map_arg(bound, lambda node: columns if node is weight else value(node))
        args, note = without_padding(padding, row, use.use.arg, whole, decoder)
        self._note(use.fqn, note)
        return row.inputs(args, use.use.arg, columns)


def _copied(values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Values that are written into without a trace in the originals; aliases stay aliases."""
    return copy.deepcopy(dict(values), {id(node): node for node in values})


def advance(walks: Sequence[Walk], fqns: Iterable[str], together: bool) -> Iterator[str]:
    """FQN after FQN, each when all walks have taken the inputs of the weight.

    Args:
        walks: in step with one another.
        fqns: in their order.
        together: whether all walks take the inputs of all of them before the first comes.
    """

    def taken() -> Iterator[str]:
        for fqn in fqns:
            for walk in walks:
                walk.advance(fqn)
            yield fqn

    return iter(list(taken())) if together else taken()


def _argument(bound: Mapping[str, Any], arg: str) -> Any:
    """An argument by its name, as a `Use` has it: `weight`, or `params[3]`."""
    name, _, place = arg.partition("[")
    return bound[name][int(place.removesuffix("]"))] if place else bound[name]


def _check_distinct(columns: Tensor) -> None:
    """Raise `UnsupportedUse` where one column of a weight is several columns of its operator's."""
    for row in columns:
        own = row[row >= 0]
        if len(own.unique()) < len(own):
            raise UnsupportedUse("a weight that is repeated along its inputs")


def _dependents(nodes: Sequence[fx.Node], graph: fx.Graph, names: Sequence[str]) -> set[fx.Node]:
    """Nodes that depend on inputs whose name has one of `names` in it."""
    inputs = graph.find_nodes(op="placeholder")
    found = {node for node in inputs if any(name in node.name for name in names)}
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _of_state_alone(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that follow from the model's tensors alone, unless something writes into them."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and node.all_input_nodes
            and found.issuperset(node.all_input_nodes)
            and not any(map(writes, (node, *node.users)))
        ):
            found.add(node)
    return found


def _last_uses(
    nodes: Sequence[fx.Node], fixed: set[fx.Node], also: Mapping[fx.Node, Iterable[fx.Node]]
) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that no later node needs.

    Args:
        nodes: in the order of the graph.
        fixed: whose values are not kept.
        also: node -> what is read when its turn comes, besides its arguments.
    """
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in fixed:
            last[node] = node
            read = (*node.all_input_nodes, *also.get(node, ()))
            last.update(dict.fromkeys((a for a in read if a not in fixed), node))
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        dying.setdefault(node, []).append(value)
    return dying
