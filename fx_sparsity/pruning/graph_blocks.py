"""Blocks: repeated modules, such as the layers of a language model, in graphs and by name."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fx_sparsity.graph.calls import writes
from fx_sparsity.pruning.batches import is_exported


class Block(NamedTuple):
    """Neighbouring nodes of a graph that belong to one module.

    Attributes:
        path: of the module; empty for a whole graph.
        start: place of the first of its nodes.
        end: place after the last.
        outputs: nodes in it, of floating values, that what follows reads; where nothing does but
            the model's caller, those that it is given.
        in_place: whether some node writes into what it is given.
    """

    path: str
    start: int
    end: int
    outputs: tuple[fx.Node, ...]
    in_place: bool


def graph_blocks(nodes: Sequence[fx.Node], consumers: Collection[fx.Node]) -> list[Block]:
    """The blocks of a graph, in its order; they share no node.

    A block is an item of a container, such as a `ModuleList`, that holds another item of its class,
    too; the outermost count. A graph without any is one block.

    Args:
        nodes: those that live, in the graph's order, but for the output.
        consumers: nodes that use weights; a block holds some of them.
    """
    stacks = {node: list(_stack(node)) for node in nodes}
    repeated = _repeated(stacks.get(node, []) for node in consumers)
    places: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        around = [path for path, _ in stacks[node] if path in repeated]
        if around and node.op == "call_function":
            places.setdefault(around[0], []).append(place)
    spans = sorted((found[0], found[-1] + 1, path) for path, found in places.items())
    apart = all(first[1] <= second[0] for first, second in pairwise(spans))
    if not spans or not apart:
        spans = [(0, len(nodes), "")]
    return [_block(nodes, *span) for span in spans]


def block_of(model: nn.Module, weights: Iterable[str]) -> dict[str, str]:
    """FQN of each weight -> path of the block that it lies in; its own FQN where it lies in none.

    A block is what it is for `graph_blocks`, here by the names of the weights that it holds.

    Args:
        model: that has the weights, masked or not, or the module of an exported program.
        weights: FQNs.
    """
    kinds = dict(_graph_kinds(model) if is_exported(model) else _module_kinds(model))
    around = {
        fqn: [(path, kinds[path]) for path in _prefixes(fqn) if path in kinds] for fqn in weights
    }
    repeated = _repeated(around.values())
    return {
        fqn: next((path for path, _ in modules if path in repeated), fqn)
        for fqn, modules in around.items()
    }


def _repeated(modules: Iterable[Iterable[tuple[str, str]]]) -> set[str]:
    """Paths of items of containers beside others of their class.

    Args:
        modules: (path, class) of those around each weight, or around what uses it.
    """
    kinds: dict[tuple[str, str], set[str]] = {}
    for around in modules:
        for path, kind in around:
            kinds.setdefault((path.rpartition(".")[0], kind), set()).add(path)
    return {
        path
        for (_, kind), paths in kinds.items()
        if len(paths) > 1 and not kind.endswith(("Sequential", "ModuleList", "ModuleDict"))
        for path in paths
        if path.rpartition(".")[2].isdecimal()
    }


def _prefixes(fqn: str) -> Iterator[str]:
    """Paths of the modules around a weight, the outermost first."""
    parts = fqn.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _module_kinds(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, class) of all modules."""
    for path, module in model.named_modules(remove_duplicate=False):
        yield path, parametrize.type_before_parametrizations(module).__qualname__


def _graph_kinds(graph: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """(path, class) of all modules that a graph was made of."""
    for node in graph.graph.nodes:
        yield from _stack(node)


def _block(nodes: Sequence[fx.Node], start: int, end: int, path: str) -> Block:
    inside, later = nodes[start:end], set(nodes[end:])
    floating = [node for node in inside if node.op == "call_function" and _is_floating(node)]
    read = [node for node in floating if not later.isdisjoint(node.users)]
    given = [node for node in floating if any(user.op == "output" for user in node.users)]
    return Block(path, start, end, tuple(read or given), any(map(writes, inside)))


def _stack(node: fx.Node) -> Iterable[tuple[str, str]]:
    """(path, class) of the modules around a node, the outermost first."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    for path, kind in stack.values():
        yield path, kind if isinstance(kind, str) else kind.__qualname__


def _is_floating(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return len(leaves) == 1 and isinstance(leaves[0], Tensor) and leaves[0].is_floating_point()
