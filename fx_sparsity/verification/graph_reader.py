"""What a node of a graph receives as a weight: float values, or codes behind a dequantization."""

from collections.abc import Iterator, Mapping, Sequence
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
    scaling = _scaling(source, dequantize, tensor)
    if scaling is None:
        obstacle = obstacle or "its scale is computed when the model runs"
        return replace(float_weight(weight.fqn, where, tensor), obstacle=obstacle)
    scale, zero_point, scheme = scaling

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
        _code_range(bind(dequantize), tensor.dtype),
        view,
        obstacle,
    )


def _scaling(
    source: Source, dequantize: fx.Node, tensor: Tensor
) -> tuple[Tensor, Tensor, str] | None:
    """Scale and zero point, broadcastable against the codes, and what to call them.

    Returns:
        None where the model does not hold them.
    """
    name, args = operator_name(dequantize), bind(dequantize)
    ending = "s" if name == "dequantize_per_channel" else ""
    scale, zero_point = (
        _constant(source, args[f"{key}{ending}"]) for key in ("scale", "zero_point")
    )
    if scale is None or zero_point is None:
        return None
    if name == "dequantize_per_channel":
        axis = args["axis"]
        shape = [-1 if dim == axis else 1 for dim in range(tensor.ndim)]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
        kind = "float" if zero_point.is_floating_point() else "integer"
        return scale, zero_point, f"per-channel affine ({kind} zero point), axis {axis}"
    if name == "dequantize_affine":
        blocks = args["block_size"]
        scale, zero_point = (_spread(v, tensor.shape, blocks) for v in (scale, zero_point))
        return scale, zero_point, f"affine, blocks of {'x'.join(map(str, blocks))}"
    return scale, zero_point, "per-tensor affine"


def _constant(source: Source, value: Any) -> Tensor | None:
    """A number, or a tensor that the graph holds; 0 where none is given."""
    if isinstance(value, fx.Node):
        held = source(value)
        return None if held is None else held[1]
    return torch.tensor(0 if value is None else value)


def _code_range(args: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Smallest and largest code; all of the type where a dequantization does not say."""
    kind = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    low, high = args.get("quant_min"), args.get("quant_max")
    return int(kind.min if low is None else low), int(kind.max if high is None else high)


def _spread(values: Tensor, shape: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """One value for each block, or one for all, as one for each element."""
    if values.numel() == 1:
        return values.reshape(())
    counts = [size // block for size, block in zip(shape, blocks, strict=True)]
    values = values.reshape(counts)
    for axis, block in enumerate(blocks):
        values = values.repeat_interleave(block, axis)
    return values


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
