"""What the node of a graph calls: its name, its arguments, and what it does with their memory."""

import inspect
import operator
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fx_sparsity.graph.operators import EMPTY, OPERATORS, RENORMALIZATIONS, UNTAGGED, Operator

_PYTHON_NAMES = {
    "truediv": "div",
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "__setitem__": "setitem",
}
_TRANSPOSES = ("T", "mT", "H", "mH")


class Call:
    """What a node calls.

    Attributes:
        node: of a graph.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @property
    def name(self) -> str:
        """See `operator_name`."""
        return operator_name(self.node)

    @cached_property
    def args(self) -> dict[str, Any]:
        """See `bind`."""
        return bind(self.node)

    @property
    def row(self) -> Operator | None:
        """Of the operator table; None where the operator has none."""
        return OPERATORS.get(self.name)

    @property
    def views(self) -> bool:
        """See `is_view`."""
        return is_view(self.node)

    @property
    def looks_up(self) -> bool:
        """See `is_lookup`."""
        return is_lookup(self.node)

    @property
    def writes(self) -> bool:
        """See `writes`."""
        return writes(self.node)

    @cached_property
    def written(self) -> fx.Node | None:
        """What it changes in place: the argument that its schema marks so, or else the first."""
        if not self.writes:
            return None
        target = self.node.args[0] if self.node.args else None
        if isinstance(self.node.target, torch._ops.OpOverload):
            target = self.args.get(_facts(self.node.target).written or "")
        return target if isinstance(target, fx.Node) else None

    @cached_property
    def base(self) -> fx.Node | None:
        """The node whose memory its result shows, where it is a view or a write."""
        node = self.node
        if node.op not in ("call_function", "call_method") or self.written is not None:
            return self.written
        viewed = node.args[0] if node.args and self.views else None
        return viewed if isinstance(viewed, fx.Node) else None

    @property
    def read(self) -> list[fx.Node]:
        """Arguments whose values count."""
        read = self.node.all_input_nodes
        return read[1:] if self.name in EMPTY else read

    @property
    def elementwise(self) -> bool:
        """See `is_elementwise`."""
        return is_elementwise(self.node)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """See `shape_of`."""
        return shape_of(self.node)


def operator_name(node: fx.Node) -> str:
    """Name of a node's operator, without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _facts(target).name
    if node.op == "call_method":
        return _PYTHON_NAMES.get(str(target), str(target))
    if target is getattr and node.args[1] in _TRANSPOSES:
        return str(node.args[1])
    name = getattr(target, "__name__", str(target))
    return _PYTHON_NAMES.get(name, name)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor, with hints for dynamic sizes; None where its graph notes none."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor):
        return None
    try:
        return tuple(known_size(size) for size in value.shape)
    except ValueError:
        return None


def known_size(size: int | torch.SymInt) -> int:
    """A size, by its hint where it is dynamic: asking for its value would specialize the graph."""
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            raise ValueError(f"size {size} is not known before running")
        return int(size.node.hint)
    return size


def bind(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name.

    ATen operators, tensor methods and built-in functions take the names of the ATen schema;
    functions written in Python take their own.
    """
    if node.target is operator.getitem:
        return {"self": node.args[0], "indices": _indices(node)}
    names = _signature(node)
    if names is None:
        return {}
    if node.target is torch.einsum:  # einsum(equation, *operands), or a list of them
        if not isinstance(node.args[0], str):
            return {}
        operands = node.args[1:]
        flat = operands[0] if isinstance(operands[0], list | tuple) else operands
        return {"equation": node.args[0], "tensors": flat}
    # Built-in functions call `input` what the schema calls `self`.
    rename = {"input": "self"} if "self" in names else {}
    named = {rename.get(name, name): value for name, value in node.kwargs.items()}
    return {**dict(zip(names, node.args, strict=False)), **named}


def is_lookup(node: fx.Node) -> bool:
    """Whether a node indexes by tensors, rather than by what is known before running."""
    name = operator_name(node)
    if name in ("index", "getitem"):
        return any(isinstance(index, fx.Node) for index in bind(node)["indices"])
    return name in ("index_select", "gather")


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is a view of its first argument, by the schema's alias annotation."""
    if node.target is operator.getitem:
        return not is_lookup(node)
    if operator_name(node) in (*_TRANSPOSES, "_unsafe_view"):
        return True
    return any(_facts(overload).views for overload in _overloads(node))


def looks_up_bias(node: fx.Node) -> bool:
    """Whether what a node looks up is but added to products of experts: the bias of each."""

    def is_added(user: fx.Node) -> bool:
        others = [value for value in user.all_input_nodes if value is not node]
        added = operator_name(user) in ("add", "add_") and len(others) == 1
        return added and _is_of_experts(_beneath_views(others[0]), node)

    return is_lookup(node) and bool(node.users) and all(map(is_added, node.users))


def _is_of_experts(product: fx.Node, lookup: fx.Node) -> bool:
    """Whether a product takes the experts that `lookup` picks: by its index, or by offsets."""
    row = OPERATORS.get(operator_name(product))
    if row is not None and row.kind == "experts":
        return True
    picked = map(_beneath_views, product.all_input_nodes if row is not None else ())
    return any(is_lookup(value) and _indices(value) == _indices(lookup) for value in picked)


def _beneath_views(node: fx.Node) -> fx.Node:
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_elementwise(node: fx.Node) -> bool:
    """Whether a node computes each element of its result from the same element of its arguments."""
    return operator_name(node) in UNTAGGED or any(
        _facts(overload).elementwise for overload in _overloads(node)
    )


def writes(node: fx.Node) -> bool:
    """Whether a node makes something else of one of its arguments, in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = operator_name(node)
    if name in RENORMALIZATIONS:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return _facts(node.target).written is not None
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


def _indices(node: fx.Node) -> tuple[Any, ...]:
    index = node.args[1]
    return tuple(index) if isinstance(index, tuple | list) else (index,)


def _signature(node: fx.Node) -> Sequence[str] | None:
    """Names of the arguments that a node's operator takes; None where they cannot be known."""
    if inspect.isfunction(node.target):
        return list(inspect.signature(node.target).parameters)
    given = len(node.args) + len(node.kwargs)
    names = (_facts(overload).arguments for overload in _overloads(node))
    return next((found for found in names if len(found) >= given), None)


def _overloads(node: fx.Node) -> list[torch._ops.OpOverload]:
    """A node's ATen operator; every overload of that name for torch functions and methods."""
    if isinstance(node.target, torch._ops.OpOverload):
        return [node.target]
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return _overloads_of(node.target)
    return _overloads_of(getattr(torch.ops.aten, operator_name(node), None))


@cache
def _overloads_of(packet: Any) -> list[torch._ops.OpOverload]:
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    return [getattr(packet, overload) for overload in packet.overloads()]


class _Facts(NamedTuple):
    """What a schema says of an operator; asking for it takes long.

    Attributes:
        name: without namespace and overload.
        arguments: their names.
        written: name of the argument that is changed in place, if one is.
        views: whether its results are views of its arguments.
        elementwise: whether torch tags it so.
    """

    name: str
    arguments: tuple[str, ...]
    written: str | None
    views: bool
    elementwise: bool


@cache
def _facts(overload: torch._ops.OpOverload) -> _Facts:
    schema = overload._schema
    results = [result.alias_info for result in schema.returns]
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return _Facts(
        name=schema.name.rpartition("::")[2],
        arguments=tuple(argument.name for argument in schema.arguments),
        written=written[0] if written else None,
        views=bool(results) and all(info and not info.is_write for info in results),
        elementwise=torch.Tag.pointwise in overload.tags,
    )
