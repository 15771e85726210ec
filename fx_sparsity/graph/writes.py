"""Which nodes of a graph show the same memory, and what a write in place brings into it."""

from collections.abc import Sequence

from torch import fx

from fx_sparsity.graph.operators import is_view, operator_name, shape_of, written
from fx_sparsity.graph.origins import Origin, placed, region_of
from fx_sparsity.graph.provenance import follow, mixed, replay


class Memory:
    """The nodes that were met so far, by the node whose memory they show: their root."""

    def __init__(self) -> None:
        self._attributes: dict[str, fx.Node] = {}
        self._roots: dict[fx.Node, fx.Node] = {}
        self._shown: dict[fx.Node, list[fx.Node]] = {}

    def note(self, node: fx.Node) -> fx.Node:
        """Note a node, after those that it reads; its root."""
        base = _base(node)
        root = node if base is None else self.root(base)
        if node.op == "get_attr":  # a trace reads an attribute anew wherever it is used
            root = self._attributes.setdefault(str(node.target), node)
        self._roots[node] = root
        self._shown.setdefault(root, []).append(node)
        return root

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose memory `node` shows."""
        return self._roots.get(node, node)

    def shown(self, root: fx.Node) -> Sequence[fx.Node]:
        """All nodes that show the memory of a root, in graph order."""
        return self._shown.get(root, [root])

    def spread(self, node: fx.Node, origins: dict[fx.Node, list[Origin]]) -> None:
        """Let all that shows what `node` writes into hold what is written, too."""
        target = written(node)
        assert target is not None
        root = self.root(target)
        before = {id(origin) for origin in origins.get(target, ())}
        brought = [origin for origin in origins.get(node, ()) if id(origin) not in before]
        region = self._region(node, target)
        found = [placed(origin, region) or mixed(node, origin) for origin in brought]
        origins.setdefault(root, []).extend(found)
        for shown in self.shown(root)[1:] if found else ():
            passed = [origin for _, origin in follow(shown, origins, True)]
            origins[shown] = passed if is_view(shown) else list(origins[_base(shown) or root])

    def _region(self, node: fx.Node, target: fx.Node) -> Origin | None:
        """What `node` writes into, as a view of its root; None where that is not known."""
        views = [target]
        while (base := _base(views[-1])) is not None:
            views.append(base)
        shape = shape_of(views[-1])
        if shape is None:
            return None
        region: Origin | None = region_of(shape)
        steps = list(filter(is_view, reversed(views[:-1])))
        for step in [*steps, node] if operator_name(node) == "setitem" else steps:
            region = None if region is None else replay(step, region)
        return region


def _base(node: fx.Node) -> fx.Node | None:
    """The node whose memory the result of a view, or of a write, shows."""
    if (target := written(node)) is not None:
        return target
    viewed = node.op in ("call_function", "call_method") and node.args and is_view(node)
    return node.args[0] if viewed and isinstance(node.args[0], fx.Node) else None
