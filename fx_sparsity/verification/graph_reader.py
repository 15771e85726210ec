"""What a node of a graph receives as a weight: float values, or codes behind a dequantization."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fx_sparsity.graph.calls import bind, is_view, operator_name
from fx_sparsity.graph.operators import SAME_VALUES
from fx_sparsity.graph.sources import Source, module_source
from fx_sparsity.graph.uses import (
    SeenWeight,
    is_annotated,
    noted_weights,
    seen_weights,
    weight_arguments,
)
from fx_sparsity.verification.stored import StoredWeight, float_weight


def read_value(source: Source, weight: SeenWeight, node: fx.Node) -> StoredWeight:
    """Walk from a consumer's argument back to the tensor that holds the weight.

    Args:
        source: tells the tensors that nodes stand for.
        weight: which weight the consumer receives.
        node: its argument.
    """
    dequantize: fx.Node | None = None
    obstacle, viewed_since = "", False
    while (found := source(node)) is None:
        name = operator_name(node)
        if name.startswith("dequantize"):
            dequantize = node
        elif is_view(node):
            # What has notes of weights is no view of the model, but part of a decomposed consumer.
            viewed_since = viewed_since or (dequantize is None and not noted_weights(node))
        elif name not in SAME_VALUES and not name.startswith("quantize"):
            obstacle = f"read through {name}"
        if not node.all_input_nodes:
            obstacle = obstacle or f"not read from the model but from {node.name}"
            nothing = torch.empty(weight.size, device="meta")
            return replace(float_weight(weight.fqn, node.name, nothing), obstacle=obstacle)
        node = node.all_input_nodes[0]
    where, tensor = found
    # Where views come after the codes, these are stored as the weight itself is.
    view = None if dequantize is None or viewed_since or weight.is_whole else weight
    expected = weight.shape if view is None else weight.size
    if tuple(tensor.shape) != expected:
        obstacle = obstacle or f"stored in shape {tuple(tensor.shape)}, expected {expected}"
    if dequantize is None:
        return replace(float_weight(weight.fqn, where, tensor), obstacle=obstacle)

    def constant(value: Any) -> Tensor:
        if isinstance(value, fx.Node):
            held = source(value)
            assert held is not None  # a quantizer's constant, held by the graph
            return held[1]
        return torch.tensor(value)

    args = bind(dequantize)
    if operator_name(dequantize) == "dequantize_per_channel":
        axis = args["axis"]
        shape = [-1 if dim == axis else 1 for dim in range(tensor.ndim)]
        scale, zero_point = constant(args["scales"]).view(shape), constant(args["zero_points"])
        zero_point = zero_point.view(shape)
        kind = "float" if zero_point.is_floating_point() else "integer"
        scheme = f"per-channel affine ({kind} zero point), axis {axis}"
    else:
        scale, zero_point = constant(args["scale"]), constant(args["zero_point"])
        scheme = "per-tensor affine"

    @torch.no_grad()
    def write(codes: Tensor) -> None:
        tensor.copy_(codes)

    return StoredWeight(
        weight.fqn,
        where,
        str(tensor.dtype).removeprefix("torch."),
        scheme,
        tensor.detach().clone(),
        write,
        scale,
        zero_point,
        (int(args["quant_min"]), int(args["quant_max"])),
        view,
        obstacle,
    )


def read_nodes(model: fx.GraphModule) -> Iterator[StoredWeight]:
    """Weights of a graph, by what its consumers read now: codes, or float values.

    Where nobody annotated the graph, what they read gives the names, and only codes are told:
    floats are weights by themselves, whatever the graph computes from them.
    """
    seen: set[tuple[str, str]] = set()
    found: dict[fx.Node, dict[str, SeenWeight]] = {}
    annotated = is_annotated(model.graph)
    source = module_source(model)
    for node, arg, weight in () if annotated else seen_weights(model):
        found.setdefault(node, {}).setdefault(arg, weight)
    for node in model.graph.nodes:
        for weight, value in weight_arguments(node, None if annotated else found.get(node, {})):
            stored = read_value(source, weight, value)
            if (weight.fqn, stored.where) not in seen and (annotated or stored.quantized):
                seen.add((weight.fqn, stored.where))
                yield stored
