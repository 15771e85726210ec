"""Graph rewriting, as passes that go into anyone's `PassManager`."""

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fx_sparsity.graph.compiled import announce_buffers, is_compiled
from fx_sparsity.graph.sources import Source, module_source
from fx_sparsity.graph.uses import note_weight, noted_weights, seen_weights
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.sparsifier import Mask
from fx_sparsity.sparsifier.mask import GRAPH_MASKS

MASK_BUFFERS = ("mask", "zero")
"""What a selection reads of a `Mask`."""


class AnnotateWeights(PassBase):
    """Write into each consuming node which weights it receives; changes nothing else.

    The annotation travels with the node through later passes, also where they replace the weight:
    after a quantizer's convert it still tells whose codes these are. So it does in what is exported
    from the graph, saved and loaded.

    Args:
        weights: a map of the same model; a tied weight is named by its canonical FQN.
    """

    def __init__(self, weights: WeightMap) -> None:
        super().__init__()
        self.weights = weights
        self.canonical = {name: site.fqn for site in weights.sites for name in site.names}

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The map is of this model: it knows weights of the graph, by their shapes.

        Raises:
            ValueError: naming the weight.
        """
        found = {seen.fqn: seen for _, _, seen in seen_weights(graph_module)}
        if found and self.canonical and self.canonical.keys().isdisjoint(found):
            raise ValueError(
                f"{next(iter(found))}: the map knows {', '.join(self.weights)}, and no weight of "
                "this graph; give the map of this model"
            )
        for seen in found.values():
            fqn = self.canonical.get(seen.fqn)
            if fqn is not None and self.weights[fqn].shape != seen.shape:
                raise ValueError(
                    f"{fqn}: the map says {self.weights[fqn].shape}, the graph has {seen.shape}; "
                    "give the map of this model"
                )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        for node, arg, seen in seen_weights(graph_module):
            fqn = self.canonical.get(seen.fqn)
            if fqn is not None:
                note_weight(node, arg, replace(seen, fqn=fqn))
        return PassResult(graph_module, False)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Every node that consumes a weight of the map says so."""
        for node, arg, seen in seen_weights(graph_module):
            if seen.fqn in self.canonical and arg not in noted_weights(node):
                raise RuntimeError(f"{seen.fqn}: {node.name} does not say that it consumes it")


class InsertMasks(PassBase):
    """Select every use of a weight through its mask: `where(mask, weight, zero)`.

    The weight is a `get_attr` node, or a placeholder of a graph that receives its weights. The mask
    module becomes a submodule, so that its buffers are in the `state_dict`, follow `.to()` and
    survive rebuilding the GraphModule, deepcopy and dead-code elimination.

    Args:
        masks: name of the weight, as `source` tells it -> its mask.
        source: which node stands for which weight; a `get_attr` node for its target by default.
    """

    def __init__(self, masks: Mapping[str, Mask], source: Source | None = None) -> None:
        super().__init__()
        self.masks = masks
        self.source = source

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Every weight is read by a node, and is not masked yet."""
        weights = self._weights(graph_module)
        for fqn in self.masks:
            if fqn not in weights.values():
                raise ValueError(f"{fqn}: no node of the graph reads it")
        for node, fqn in weights.items():
            if is_masked(node):
                raise ValueError(f"{fqn} is already masked in this graph")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        graph = graph_module.graph
        weights = self._weights(graph_module)
        for fqn, mask in self.masks.items():
            graph_module.add_submodule(mask_path(fqn), mask)
            announce_buffers(graph_module, (f"{mask_path(fqn)}.{name}" for name in MASK_BUFFERS))
        for node, fqn in weights.items():
            users = list(node.users)
            if not users:
                continue
            following = node.next
            while following.op == "placeholder":
                following = following.next
            with graph.inserting_before(following):
                keep, zero = (graph.get_attr(f"{mask_path(fqn)}.{name}") for name in MASK_BUFFERS)
                where = torch.ops.aten.where.self
                masked = graph.call_function(where, (keep, node, zero))
            if node.op == "get_attr":  # what is noted on an input is about the input
                masked.meta = dict(node.meta)
            for key in ("val", "example_value"):
                if (weight := node.meta.get(key)) is not None:
                    mask = self.masks[fqn]
                    keep.meta[key] = torch.empty_like(weight, dtype=mask.mask.dtype)
                    zero.meta[key] = weight.new_zeros((), dtype=mask.zero.dtype)
                    masked.meta[key] = torch.empty_like(weight)
            for user in users:
                user.replace_input_with(node, masked)
        graph_module.recompile()
        return PassResult(graph_module, bool(self.masks))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Nothing but the selection reads a masked weight."""
        graph_module.graph.lint()
        for node, fqn in self._weights(graph_module).items():
            readers = [str(user.target) for user in node.users]
            if readers and readers != ["aten.where.self"]:
                raise RuntimeError(f"{fqn} is read past its mask by {readers}")

    def _weights(self, graph_module: fx.GraphModule) -> dict[fx.Node, str]:
        source = self.source or module_source(graph_module)
        found = {node: source(node) for node in graph_module.graph.nodes}
        return {node: f[0] for node, f in found.items() if f is not None and f[0] in self.masks}


class RemoveMasks(PassBase):
    """Undo `InsertMasks`: consumers read the weight itself again, and the masks are gone.

    The masks of a backend's graph stay submodules, for what was compiled from it reads them yet.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        graph = graph_module.graph
        modified = False
        for node in list(graph.nodes):
            if not _selects(node):
                continue
            keep, weight, zero = node.args
            node.replace_all_uses_with(weight)
            for dead in (node, zero, keep):
                graph.erase_node(dead)
            modified = True
        if hasattr(graph_module, GRAPH_MASKS) and not is_compiled(graph_module):
            graph_module.delete_submodule(GRAPH_MASKS)
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well-formed and reads no mask."""
        graph_module.graph.lint()
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                operator.attrgetter(str(node.target))(graph_module)


def is_masked(node: fx.Node) -> bool:
    """Whether the weight at a node is selected through a mask of `InsertMasks`."""
    return any(_selects(user) and user.args[1] is node for user in node.users)


def _selects(node: fx.Node) -> bool:
    """Whether a node is a selection that `InsertMasks` put there."""
    return (
        node.op == "call_function"
        and node.target is torch.ops.aten.where.self
        and isinstance(keep := node.args[0], fx.Node)
        and is_mask(keep)
    )


def is_mask(node: fx.Node) -> bool:
    """Whether a node reads a mask that `InsertMasks` put there."""
    return node.op == "get_attr" and is_mask_name(str(node.target))


def is_mask_name(fqn: str | None) -> bool:
    """Whether a buffer belongs to a mask, going by its FQN."""
    return fqn is not None and fqn.startswith(f"{GRAPH_MASKS}.")


def mask_path(fqn: str) -> str:
    """Where a weight's mask lives in a GraphModule: under the weight's own path, so that no two
    weights collide.
    """
    return f"{GRAPH_MASKS}.{fqn}"
