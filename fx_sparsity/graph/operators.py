"""The operator table: which argument of which operator is a weight, and what its axes mean.

One row an operator. Arguments are bound by the name that the operator's schema gives them, never by
position: `F.embedding(indices, weight)` and `aten.embedding(weight, indices)` differ in order only.
A row names the operator without its namespace and overload, so that it serves ATen graphs, traced
`torch` functions and tensor methods alike.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fx_sparsity.patterns import Role

Axes = Mapping[int, Role]
"""Axis of the argument, negative from the end -> its role. Axes not named are `batch`."""
Arguments = Mapping[str, Any]
Finder = Callable[[Arguments], Iterable[tuple[str, Any, Axes]]]

ROW_OUTPUT: Axes = {0: "out", 1: "in"}
RIGHT_FACTOR: Axes = {-2: "in", -1: "out"}
LEFT_FACTOR: Axes = {-2: "out", -1: "in"}
TABLE: Axes = {0: "row", 1: "dim"}
CONV: Axes = {0: "out", 1: "in", 2: "kernel", 3: "kernel", 4: "kernel"}
CONV_TRANSPOSED: Axes = {0: "in", 1: "out", 2: "kernel", 3: "kernel", 4: "kernel"}


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        kind: what the weight is called in a `WeightMap`.
        find: bound arguments -> (argument name, its value, its axes) of every possible weight.
    """

    kind: str
    find: Finder


def _at(**axes: Axes) -> Finder:
    """Weights are the arguments of these names."""
    return lambda args: [(name, args[name], a) for name, a in axes.items() if name in args]


def _convolution(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    yield "weight", args["weight"], CONV_TRANSPOSED if args["transposed"] else CONV


def _recurrent(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    for i, weight in enumerate(args["params"]):
        yield f"params[{i}]", weight, ROW_OUTPUT


def _einsum(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    """A letter that the result lacks is reduced; one that only this operand has is an output."""
    equation, operands = args["equation"].replace(" ", ""), args["tensors"]
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != len(operands):
        return
    for i, (term, operand) in enumerate(zip(terms, operands, strict=True)):
        others = "".join(terms[:i] + terms[i + 1 :])
        axes: dict[int, Role] = {
            axis: "in" if c not in result else "batch" if c in others else "out"
            for axis, c in enumerate(term)
        }
        yield f"tensors[{i}]", operand, axes


OPERATORS: dict[str, Operator] = {
    "linear": Operator("linear", _at(weight=ROW_OUTPUT)),
    "addmm": Operator("linear", _at(mat2=RIGHT_FACTOR, mat1=LEFT_FACTOR)),
    "mm": Operator("matmul", _at(mat2=RIGHT_FACTOR, self=LEFT_FACTOR)),
    "matmul": Operator("matmul", _at(other=RIGHT_FACTOR, self=LEFT_FACTOR)),
    "bmm": Operator("matmul", _at(mat2=RIGHT_FACTOR, self=LEFT_FACTOR)),
    "baddbmm": Operator("matmul", _at(batch2=RIGHT_FACTOR, batch1=LEFT_FACTOR)),
    "_grouped_mm": Operator("experts", _at(mat2=RIGHT_FACTOR)),
    "grouped_mm_fallback": Operator("experts", _at(weight=RIGHT_FACTOR)),
    "einsum": Operator("einsum", _einsum),
    "embedding": Operator("embedding", _at(weight=TABLE)),
    "embedding_bag": Operator("embedding_bag", _at(weight=TABLE)),
    "_embedding_bag": Operator("embedding_bag", _at(weight=TABLE)),
    "_embedding_bag_forward_only": Operator("embedding_bag", _at(weight=TABLE)),
    "conv1d": Operator("conv", _at(weight=CONV)),
    "conv2d": Operator("conv", _at(weight=CONV)),
    "conv3d": Operator("conv", _at(weight=CONV)),
    "conv_transpose1d": Operator("conv_transpose", _at(weight=CONV_TRANSPOSED)),
    "conv_transpose2d": Operator("conv_transpose", _at(weight=CONV_TRANSPOSED)),
    "conv_transpose3d": Operator("conv_transpose", _at(weight=CONV_TRANSPOSED)),
    "convolution": Operator("conv", _convolution),
    "lstm": Operator("recurrent", _recurrent),
    "gru": Operator("recurrent", _recurrent),
}

MODULES: dict[type[nn.Module], tuple[str, Mapping[str, Axes]]] = {
    nn.Linear: ("linear", {"weight": ROW_OUTPUT}),
    nn.Embedding: ("embedding", {"weight": TABLE}),
    nn.EmbeddingBag: ("embedding_bag", {"weight": TABLE}),
    nn.modules.conv._ConvTransposeNd: ("conv_transpose", {"weight": CONV_TRANSPOSED}),
    nn.modules.conv._ConvNd: ("conv", {"weight": CONV}),
}
"""Weights of modules that a traced graph calls as a whole; the first class that fits counts."""

ADDITIONS = frozenset({"add", "add_", "sub", "sub_", "cat"})
"""Consumers that only add a parameter to something."""
NORMALIZATIONS = frozenset({"layer_norm", "native_layer_norm", "rms_norm", "group_norm", "mul"})
"""Consumers that scale by a parameter."""
SAME_VALUES = frozenset(
    {
        *("alias", "clone", "contiguous", "detach", "lift_fresh_copy", "requires_grad_"),
        *("to", "_to_copy", "float", "half", "bfloat16", "double", "type_as"),
        *("dequantize_per_tensor", "dequantize_per_channel", "dequantize_affine"),
        *("where", "dropout"),
    }
)
"""Operators whose result stands for the same weight, element by element."""


def operator_name(node: fx.Node) -> str:
    """Name of a node's operator, without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    if node.op == "call_method":
        return str(target)
    if target is getattr and node.args[1] in ("T", "mT"):
        return str(node.args[1])
    return getattr(target, "__name__", str(target))


def bind(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name.

    ATen operators, tensor methods and built-in functions take the names of the ATen schema;
    functions written in Python take their own.
    """
    names = _signature(node)
    if names is None:
        return {}
    if node.target is torch.einsum:  # einsum(equation, *operands), or a list of them
        operands = node.args[1:]
        flat = operands[0] if isinstance(operands[0], list | tuple) else operands
        return {"equation": node.args[0], "tensors": flat}
    # Built-in functions call `input` what the schema calls `self`.
    rename = {"input": "self"} if "self" in names else {}
    named = {rename.get(name, name): value for name, value in node.kwargs.items()}
    return {**dict(zip(names, node.args, strict=False)), **named}


def _signature(node: fx.Node) -> list[str] | None:
    """Names of the arguments that a node's operator takes; None where they cannot be known."""
    if isinstance(node.target, torch._ops.OpOverload):
        return [argument.name for argument in node.target._schema.arguments]
    if inspect.isfunction(node.target):
        return list(inspect.signature(node.target).parameters)
    packet = getattr(torch.ops.aten, operator_name(node), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    schemas = [getattr(packet, name)._schema for name in packet.overloads()]
    given = len(node.args) + len(node.kwargs)
    fitting = [schema for schema in schemas if len(schema.arguments) >= given]
    return [argument.name for argument in fitting[0].arguments] if fitting else None


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is a view of its first argument, by the schema's alias annotation."""
    if node.target is operator.getitem or operator_name(node) in ("T", "mT"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return _returns_view(node.target._schema)
    packet = getattr(torch.ops.aten, operator_name(node), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(_returns_view(getattr(packet, name)._schema) for name in packet.overloads())


def _returns_view(schema: Any) -> bool:
    infos = [result.alias_info for result in schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)
