"""Which column of a weight each element of a value belongs to, as graphs compute with it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fx_sparsity.graph.calls import (
    bind,
    is_elementwise,
    is_lookup,
    is_view,
    operator_name,
    shape_of,
)
from fx_sparsity.graph.operators import (
    COMBINATIONS,
    LEFT_FACTOR,
    OPERATORS,
    PRODUCTS,
    REARRANGEMENTS,
    SAME_VALUES,
)
from fx_sparsity.graph.sources import Source
from fx_sparsity.graph.uses import canonical_fqn
from fx_sparsity.pruning.routing import Value


class Columns:
    """Follows the columns of weights through one graph.

    Args:
        source: of the graph's tensors.
        named: every name of a weight -> its FQN.
        columns: FQN -> the column of every element of the weight (`MatrixForm.columns`).
    """

    def __init__(
        self, source: Source, named: Mapping[str, str], columns: Callable[[str], Tensor]
    ) -> None:
        self._source, self._named, self._columns = source, named, columns

    def follow(self, node: fx.Node, fqn: str, value: Value) -> Any:
        """Which column of a weight each element of a node belongs to; None where it is not in it.

        What happens to the weight on its way happens to the numbers of its columns; arithmetic with
        other constants, such as a mask or a scale, changes none of them.
        """
        found = self._source(node)
        if found is not None:
            name = canonical_fqn(found[0])
            return self._columns(fqn) if self._named.get(name, name) == fqn else None
        if node.op != "call_function":
            return None
        name = operator_name(node)
        if name in COMBINATIONS:
            return self._follow_parts(node, fqn, value)
        if name in SAME_VALUES or is_view(node) or is_lookup(node):
            return self._follow_view(node, fqn, value)
        if name in REARRANGEMENTS:  # counted from one, since zeros may fill what is new
            moved = self._follow_view(node, fqn, value, first=1)
            return None if moved is None else moved - 1
        if is_elementwise(node):
            return self._follow_operands(node, fqn, value)
        return self._follow_factor(node, fqn, value) if name in PRODUCTS else None

    def _follow_factor(self, node: fx.Node, fqn: str, value: Value) -> Any:
        """Through a product of constants, where its inputs are those of this factor, too."""
        for _, factor, axes in OPERATORS[operator_name(node)].find(bind(node)):
            columns = self.follow(factor, fqn, value)
            if columns is None:
                continue
            summed, kept = (next(a for a in axes if axes[a] == role) for role in ("in", "out"))
            assert summed is not None
            assert kept is not None
            seen = columns.select(summed, 0)
            if not torch.equal(columns, seen.unsqueeze(summed).expand_as(columns)):
                return None  # what is summed over are its columns
            left = axes == LEFT_FACTOR
            return seen.unsqueeze(-1 if left else -2).expand(value(node).shape)
        return None

    def _follow_parts(self, node: fx.Node, fqn: str, value: Value) -> Any:
        """Through `cat` and its kin: other tensors beside the weight have no column of it, -1."""
        parts: Any = node.args[0]
        columns = [self.follow(part, fqn, value) for part in parts]
        if all(part is None for part in columns):
            return None
        filled = [
            torch.full(value(part).shape, -1, device=value(part).device) if found is None else found
            for found, part in zip(columns, parts, strict=True)
        ]
        rest, kwargs = fx.map_arg((node.args[1:], node.kwargs), value)
        return node.target(filled, *rest, **kwargs)  # type: ignore[operator]

    def _follow_view(self, node: fx.Node, fqn: str, value: Value, first: int = 0) -> Any:
        """Through an operator that moves elements of its first argument, or returns them all.

        Args:
            node: the operator.
            fqn: of the weight.
            value: of a node.
            first: number of the first column.
        """
        name, viewed = operator_name(node), node.args[0] if node.args else None
        passed = self.follow(viewed, fqn, value) if isinstance(viewed, fx.Node) else None
        if passed is None:
            return None
        passed = passed + first if first else passed
        if name in SAME_VALUES:
            return (passed, None) if name == "_weight_norm_interface" else passed
        rest, kwargs = fx.map_arg((node.args[1:], node.kwargs), value)
        try:
            return node.target(passed, *rest, **kwargs)  # type: ignore[operator]
        except RuntimeError:  # the numbers take no memory along `out`, which allows fewer views
            return node.target(passed.contiguous(), *rest, **kwargs)  # type: ignore[operator]

    def _follow_operands(self, node: fx.Node, fqn: str, value: Value) -> Any:
        """Through elementwise arithmetic: by the operand that has the result's shape."""
        for operand in node.all_input_nodes:
            passed = self.follow(operand, fqn, value)
            if passed is not None and tuple(passed.shape) == shape_of(node):
                return passed
        return None
