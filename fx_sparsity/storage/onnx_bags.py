"""Embedding bags of one size as lookups and sums: torch's exporter makes a loop over bags of each.

ONNX Runtime takes a row at a time in such a loop, and OpenVINO does not take it at all.
"""

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fx_sparsity.graph.calls import bind
from fx_sparsity.graph.sources import exported_source

aten = torch.ops.aten
_BAGS = (aten.embedding_bag.padding_idx, aten.embedding_bag.default)
_RANGES = (aten.arange.start_step, aten.arange.start, aten.arange.default)
_SUM, _MEAN, _MAX = range(3)


def unroll_bags(program: ExportedProgram) -> bool:
    """Look up all rows of a bag at once, where all bags are of one size.

    Such are those of inputs with two dimensions, and of offsets that are a range, or a constant
    one. Bags of other sizes stay as they are, and so do those of which more is read than the
    result, and maxima with a row of padding.

    Args:
        program: its graph is changed in place, and computes the same.

    Returns:
        Whether there were any.
    """
    changed = False
    for node in [node for node in program.graph.nodes if node.target in _BAGS]:
        size = _size(node, program)
        if size is not None and _reads_the_result(node) and not _padded_maximum(node):
            _unroll(node, size)
            changed = True
    if changed:
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
    return changed


def _size(node: fx.Node, program: ExportedProgram) -> Any:
    """Rows in each bag: a number, or the node that computes it; None where bags may differ."""
    # Brings sympy along, which nothing else here needs.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    args = bind(node)
    offsets, count = args["offsets"], args["indices"].meta["val"].shape[0]
    end = count + bool(args.get("include_last_offset"))  # the last offset is where bags end
    if offsets.target in _RANGES:
        given = bind(offsets)
        size = given.get("step", 1)
        whole = given.get("start", 0) == 0 and statically_known_true(_value(given["end"]) == end)
        return size if whole and statically_known_true(count % _value(size) == 0) else None
    held = exported_source(program)(offsets)
    if held is None or not isinstance(count, int) or len(known := held[1]) < 2:
        return None
    size = int(known[1] - known[0])
    expected = torch.arange(0, end, size) if size > 0 and count % size == 0 else known[:0]
    return size if torch.equal(known.long(), expected) else None


def _value(argument: Any) -> Any:
    """What an argument of a node is: a number, or a symbol for it."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _reads_the_result(node: fx.Node) -> bool:
    return all(user.args[1] == 0 for user in node.users)


def _padded_maximum(node: fx.Node) -> bool:
    args = bind(node)
    return args.get("mode") == _MAX and args.get("padding_idx") is not None


def _unroll(node: fx.Node, size: Any) -> None:
    """Put lookups and a reduction in the place of one node."""
    args = bind(node)
    mode, padding = args.get("mode", _SUM), args.get("padding_idx")
    weights, table = args.get("per_sample_weights"), args["weight"].meta["val"]

    def call(target: Any, *arguments: Any) -> fx.Node:
        made = node.graph.call_function(target, arguments)
        made.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return made

    with node.graph.inserting_before(node):
        ids = call(aten.reshape.default, args["indices"], [-1, size])
        rows = call(aten.embedding.default, args["weight"], ids)
        if weights is not None:
            rows = call(aten.mul.Tensor, rows, call(aten.reshape.default, weights, [-1, size, 1]))
        if padding is not None:
            left_out = call(aten.eq.Scalar, ids, padding % table.shape[0])
            rows = call(aten.masked_fill.Scalar, rows, call(aten.unsqueeze.default, left_out, 2), 0)
        if mode == _MAX:
            result = call(aten.amax.default, rows, [1])
        elif mode == _MEAN and padding is None:
            result = call(aten.mean.dim, rows, [1])
        else:
            result = call(aten.sum.dim_IntList, rows, [1])
        if mode == _MEAN and padding is not None:
            kept = call(aten.sum.dim_IntList, call(aten.logical_not.default, left_out), [1], True)
            result = call(aten.div.Tensor, result, call(aten.clamp.default, kept, 1))
    for user in list(node.users):
        user.replace_all_uses_with(result)
