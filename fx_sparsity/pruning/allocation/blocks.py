"""Which weights belong together: those of one repeated module, such as a layer of a transformer."""

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.utils import parametrize

from fx_sparsity.pruning.batches import is_exported

_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")


def block_of(model: nn.Module, weights: Iterable[str]) -> dict[str, str]:
    """FQN of each weight -> path of the block that it lies in; its own FQN where it lies in none.

    A block is an item of a `ModuleList` or `Sequential` that lies beside another of its class,
    where both hold some of the weights. The outermost counts: what a block holds makes no blocks.
    Of the graph of an exported program, the modules are those that it notes on its nodes.

    Args:
        model: that has the weights, masked or not, or the module of an exported program.
        weights: FQNs.
    """
    kinds = dict(_graph_kinds(model) if is_exported(model) else _module_kinds(model))
    weights = list(weights)
    items = {fqn: [path for path in _items(fqn) if path in kinds] for fqn in weights}
    alike: dict[tuple[str, str], set[str]] = {}
    for path in {path for paths in items.values() for path in paths}:
        alike.setdefault((path.rpartition(".")[0], kinds[path]), set()).add(path)
    repeated = {
        path
        for (_, kind), paths in alike.items()
        if len(paths) > 1 and not kind.endswith(_CONTAINERS)
        for path in paths
    }
    return {fqn: next((p for p in items[fqn] if p in repeated), fqn) for fqn in weights}


def _items(fqn: str) -> Iterator[str]:
    """Paths of the items of containers around a weight, the outermost first."""
    parts = fqn.split(".")
    for end, part in enumerate(parts[:-1], 1):
        if part.isdecimal():
            yield ".".join(parts[:end])


def _module_kinds(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, class) of all modules."""
    for path, module in model.named_modules(remove_duplicate=False):
        yield path, parametrize.type_before_parametrizations(module).__qualname__


def _graph_kinds(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, class) of all modules that a graph was made of."""
    assert is_exported(model)
    for node in model.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            yield path, kind if isinstance(kind, str) else kind.__qualname__
