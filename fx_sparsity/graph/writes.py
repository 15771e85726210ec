"""Which nodes of a graph show the same memory, and what a write in place brings into it."""

from collections.abc import Iterator

from torch import fx

from fx_sparsity.graph.calls import Call
from fx_sparsity.graph.origins import Origin, placed, region_of
from fx_sparsity.graph.provenance import follow, mixed, replay


class Memory:
    """The calls that were met so far, by the node whose memory they show: their root."""

    def __init__(self) -> None:
        self._attributes: dict[str, fx.Node] = {}
        self._calls: dict[fx.Node, Call] = {}
        self._roots: dict[fx.Node, fx.Node] = {}
        self._shown: dict[fx.Node, list[Call]] = {}

    def note(self, call: Call) -> fx.Node:
        """Note a call, after those that it reads; its root."""
        node, base = call.node, call.base
        root = node if base is None else self.root(base)
        if node.op == "get_attr":  # a trace reads an attribute anew wherever it is used
            root = self._attributes.setdefault(str(node.target), node)
        self._calls[node] = call
        self._roots[node] = root
        self._shown.setdefault(root, []).append(call)
        return root

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose memory `node` shows."""
        return self._roots.get(node, node)

    def shown(self, root: fx.Node) -> Iterator[fx.Node]:
        """All nodes that show the memory of a root, in graph order."""
        return (call.node for call in self._shown[root])

    def spread(self, call: Call, origins: dict[fx.Node, list[Origin]]) -> None:
        """Let all that shows what a call writes into hold what is written, too."""
        target = call.written
        assert target is not None
        root = self.root(target)
        before = {id(origin) for origin in origins.get(target, ())}
        brought = [origin for origin in origins.get(call.node, ()) if id(origin) not in before]
        region = self._region(call, target)
        found = [placed(origin, region) or mixed(call, origin) for origin in brought]
        origins.setdefault(root, []).extend(found)
        for shown in self._shown[root][1:] if found else ():
            passed = [origin for _, origin in follow(shown, origins, True)]
            origins[shown.node] = passed if shown.views else list(origins[shown.base or root])

    def _region(self, call: Call, target: fx.Node) -> Origin | None:
        """What a call writes into, as a view of its root; None where that is not known."""
        views = [self._calls[target]]
        while (base := views[-1].base) is not None:
            views.append(self._calls[base])
        shape = views[-1].shape
        if shape is None:
            return None
        region: Origin | None = region_of(shape)
        steps = [view for view in reversed(views[:-1]) if view.views]
        for step in [*steps, call] if call.name == "setitem" else steps:
            region = None if region is None else replay(step, region)
        return region
