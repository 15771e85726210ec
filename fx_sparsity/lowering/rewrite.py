"""Lowering of graphs without modules: nodes that compute layers are rewritten."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import count

from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fx_sparsity.graph.calls import bind
from fx_sparsity.graph.program_editor import NodeCall, replace_nodes
from fx_sparsity.lowering.dense_tables import Lookup
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.lowering.places import GraphPlace

Packed = Mapping[GraphPlace, LoweredLinear | Lookup]
"""Place in a graph -> what takes it."""

KERNELS = "fx_sparsity_kernels"
"""Submodule of a rewritten GraphModule that holds the packed layers, by the names of weights."""


class LowerNodes(PassBase):
    """Call a packed layer in the place of each node; weights that nothing reads any more go.

    Args:
        packed: place in the graph -> the layer.
    """

    def __init__(self, packed: Packed) -> None:
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
            # Asked for now: where the layer before was lowered, they are other nodes by then.
            args, result = bind(place.node), place.result
            assert result is not None
            with graph.inserting_before(place.node):
                new = graph.call_module(name, tuple(args.get(arg) for arg in place.inputs))
            new.meta = dict(result.meta)
            result.replace_all_uses_with(new)
            for unread in (*place.node.users, place.node):
                graph.erase_node(unread)
        graph.eliminate_dead_code()
        for fqn in read - set(_attributes(graph)):
            owner, _, attribute = fqn.rpartition(".")
            delattr(graph_module.get_submodule(owner), attribute)
        graph_module.recompile()
        return PassResult(graph_module, bool(self.packed))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well-formed."""
        graph_module.graph.lint()


def lower_program(program: ExportedProgram, packed: Packed) -> ExportedProgram:
    """A program with the operators of packed layers in the place of nodes; `program` stays."""
    taken = {name.rpartition(".")[0] for name in (*program.state_dict, *program.constants)}
    calls = {}
    for (place, layer), name in zip(packed.items(), _names(packed, taken), strict=True):
        assert place.result is not None
        calls[place.node.name] = NodeCall(name, layer, place.inputs, place.result.name)
    return replace_nodes(program, calls)


def _names(packed: Iterable[GraphPlace], taken: set[str]) -> Iterator[str]:
    """Paths for packed layers, by the weights they stand for; `__1` and so on for further ones."""
    taken = set(taken)
    for place in packed:
        first = f"{KERNELS}.{place.fqn}"
        name = next(n for i in count() if (n := f"{first}__{i}" if i else first) not in taken)
        taken.add(name)
        yield name


def _attributes(graph: fx.Graph) -> Iterator[str]:
    return (str(node.target) for node in graph.find_nodes(op="get_attr"))
