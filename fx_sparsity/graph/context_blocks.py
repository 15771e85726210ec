"""Blocks of `torch.no_grad` and `torch.autocast`, and regions that are compiled once, opened up."""

import operator
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

AUTOCAST_META = "fx_sparsity_autocast"
"""Key in `node.meta`: arguments of every `torch.autocast` around a node, the outermost first."""
_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_REGION = torch.ops.higher_order.invoke_subgraph
_BODY = {_SET_GRAD: (1, 2), _AUTOCAST: (4, 5), _REGION: (0, 2)}
"""Operator -> which argument is its subgraph, and which is the first of the operands."""


class OpenBlocks(PassBase):
    """Put what happens inside these blocks into the graph around them.

    Whether gradients are on makes no difference to values. What autocasting makes of an operator,
    `run_node` knows: plain execution of the opened graph does without it.
    """

    opened: frozenset[Any] = frozenset({_SET_GRAD, _AUTOCAST})

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """See `PassBase.call`."""
        blocks = [node for node in graph_module.graph.nodes if node.target in self.opened]
        for node in blocks:
            self._open(graph_module, node)
        if blocks:
            graph_module.recompile()
        return PassResult(graph_module, bool(blocks))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well-formed, and no block is left."""
        graph_module.graph.lint()
        assert not any(node.target in self.opened for node in graph_module.graph.nodes)

    def _open(self, gm: fx.GraphModule, node: fx.Node) -> None:
        place, first = _BODY[node.target]  # type: ignore[index]
        held, operands = node.args[place], node.args[first:]
        assert isinstance(held, fx.Node)
        body = getattr(gm, str(held.target))
        type(self)()(body)
        context = (tuple(node.args[:place]),) if node.target is _AUTOCAST else ()
        values = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            with gm.graph.inserting_before(node):
                copied = gm.graph.node_copy(inner, values.__getitem__)
            if inner.op == "get_attr":  # such as the branches of a condition
                copied.target = f"{held.target}_{inner.target}".replace(".", "_")
                setattr(gm, copied.target, operator.attrgetter(str(inner.target))(body))
            elif context:
                copied.meta[AUTOCAST_META] = context + inner.meta.get(AUTOCAST_META, ())
            values[inner] = copied
        (results,) = body.graph.output_node().args
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(values[results[user.args[1]]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not held.users:
            gm.graph.erase_node(held)


class OpenRegions(OpenBlocks):
    """Put each call of a `torch.compiler.nested_compile_region` into the graph around it.

    The calls share one subgraph, which cannot have the kernels and masks of each call's weights.
    """

    opened = frozenset({_REGION})


def run_node(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Call a node's operator, in the blocks of autocasting that it came from."""
    with ExitStack() as stack:
        for arguments in node.meta.get(AUTOCAST_META, ()):
            stack.enter_context(torch.autocast(*arguments))
        return node.target(*args, **kwargs)  # type: ignore[operator]
