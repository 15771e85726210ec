"""Experts: which tokens a router sends to each of them, and what they meet if it sends all to all.

Between a router's choice and the product with a stack of experts, tokens are sorted, picked and
counted in as many ways as there are implementations. So nothing is read off these operators: they
are run again, on another choice, or with tokens that are marked.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fx_sparsity.graph.calls import operator_name, shape_of, writes
from fx_sparsity.graph.context_blocks import run_node
from fx_sparsity.graph.weight_inputs import WeightInputs
from fx_sparsity.pruning.padding import Padding

Value = Callable[[fx.Node], Any]


class Routing(NamedTuple):
    """How the inputs of a stack of experts come from a router's choice.

    Attributes:
        choice: node that gives the experts of each token: integers, [..., k].
        experts: how many there are.
        region: nodes between the choice and the product, in graph order.
        sources: what these and the product read from outside, besides the model's tensors.
    """

    choice: fx.Node
    experts: int
    region: tuple[fx.Node, ...]
    sources: frozenset[fx.Node]

    def marked(self, value: Value, padding: Padding, decoder: bool) -> dict[fx.Node, Tensor]:
        """Sources whose padding is NaN; none where there is no padding, or nobody can tell.

        Args:
            value: of a node.
            padding: of the batch.
            decoder: whether the sources depend on what the decoder is given.
        """
        found = {}
        for node in self.sources if padding.keep else ():
            source = value(node)
            if isinstance(source, Tensor) and source.is_floating_point() and source.ndim > 1:
                keep = padding.find(source.shape, decoder)
                if keep is not None and bool(source.isfinite().all()):
                    keep = keep.to(source.device)
                    rest = source.ndim - keep.ndim
                    found[node] = source.masked_fill(~keep[(..., *[None] * rest)], torch.nan)
        return found

    def turns(self, value: Value, everyone: bool, marked: dict[fx.Node, Tensor]) -> Iterator[Value]:
        """Values of nodes for one choice after another.

        Args:
            value: of a node, as the router chose.
            everyone: whether every token is to meet every expert; it then meets each of them as
                often, once where k divides their number.
            marked: sources with other values.
        """
        chosen = value(self.choice)
        k = chosen.shape[-1]
        if not everyone:
            yield self._again(value, {**marked, self.choice: chosen})
            return
        slots = torch.arange(k, dtype=chosen.dtype, device=chosen.device)
        for first in range(0, self.experts, math.gcd(k, self.experts)):
            other = ((slots + first) % self.experts).expand_as(chosen).contiguous()
            yield self._again(value, {**marked, self.choice: other})

    def without_marked(
        self, found: Sequence[WeightInputs], value: Value, marked: dict[fx.Node, Tensor]
    ) -> Sequence[WeightInputs] | None:
        """Inputs without the rows that are marked; None where others than those became NaN.

        Args:
            found: of all experts.
            value: of a node.
            marked: sources that are.
        """
        rest, gone = [], 0
        for inputs in found:
            assert inputs.x is not None
            rows = inputs.x.isnan().any(-1)
            gone += int(rows.sum())
            if len(rows) == 1:
                x = inputs.x[:, ~rows[0]]
                rest.append(inputs._replace(x=x, tokens=x.shape[1]))
            else:  # each row has an expert of its own
                keep = ~rows.any(-1)
                rest.append(inputs._replace(x=inputs.x[keep], columns=inputs.columns[keep]))
        tokens = max(int(source.isnan().any(-1).sum()) for source in marked.values())
        return rest if gone == tokens * value(self.choice).shape[-1] else None

    def _again(self, value: Value, given: dict[fx.Node, Any]) -> Value:
        """Run the region on what is given, and else on what `value` says."""
        values = dict(given)
        copies = any(map(writes, self.region))  # no source is to be changed

        def again(node: fx.Node) -> Any:
            if node not in values:
                found = value(node)
                own = copies and node in self.sources and isinstance(found, Tensor)
                values[node] = found.clone() if own else found
            return values[node]

        for node in self.region:
            args, kwargs = fx.map_arg((node.args, node.kwargs), again)
            values[node] = run_node(node, args, kwargs)
        return again


def find_routing(
    node: fx.Node, weight: fx.Node, order: dict[fx.Node, int], fixed: set[fx.Node]
) -> Routing | None:
    """The routing of a product with a stack; None where no router decides which tokens it takes.

    Args:
        node: the product.
        weight: what it receives as its weight.
        order: live nodes of the graph -> their places.
        fixed: those that follow from the model's tensors alone.
    """
    deciding = [
        value
        for value in node.all_input_nodes
        if value not in fixed and (value is weight or _is_integer(value))
    ]
    choices = [found for found in _before(deciding, order, 0) if _is_choice(found)]
    if not choices:
        return None
    choice = max(choices, key=order.__getitem__)
    scores = shape_of(choice.args[0].args[0])  # type: ignore[union-attr, arg-type]
    if scores is None:
        return None
    after = _before(node.all_input_nodes, order, order[choice] + 1) - fixed
    region = tuple(sorted(after, key=order.__getitem__))
    read = {value for found in (*region, node) for value in found.all_input_nodes}
    return Routing(choice, scores[-1], region, frozenset(read - after - fixed | {choice}))


def _is_choice(node: fx.Node) -> bool:
    """Whether a node gives the indices of `torch.topk`."""
    pair = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return isinstance(pair, fx.Node) and operator_name(pair) == "topk"


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point()


def _before(starts: Iterable[fx.Node], order: dict[fx.Node, int], first: int) -> set[fx.Node]:
    """Nodes that `starts` depend on, and these, from a place in the graph on."""
    found: set[fx.Node] = set()
    pending = list(starts)
    while pending:
        node = pending.pop()
        if node not in found and order.get(node, -1) >= first:
            found.add(node)
            pending += node.all_input_nodes
    return found
