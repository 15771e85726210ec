"""Follows a parameter through the operators on its way to its consumers.

The view chain (t, permute, chunk, select, ...) is replayed on a meta tensor of the parameter's
shape. Where a chain has to copy, a fresh meta tensor takes over and remembers the view that it was
copied from. One code path for packed projections, stacked experts and transposed storage.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fx_sparsity.graph.calls import Call, known_size, operator_name, shape_of
from fx_sparsity.graph.operators import (
    BATCH,
    COMBINATIONS,
    COPIES,
    DIFFERENCES,
    LEFT_FACTOR,
    MIXTURES,
    POWERS,
    PRODUCTS,
    REARRANGEMENTS,
    REDUCTIONS,
    SAME_VALUES,
    SCALINGS,
    SCATTERS,
    SELECTIONS,
    Axes,
)
from fx_sparsity.graph.origins import Origin, Origins, placed, region_of


def follow(call: Call, origins: Origins, constant: bool) -> Iterator[tuple[fx.Node, Origin]]:
    """What a node passes on of the parameters that it receives.

    Args:
        call: of the node.
        origins: of the nodes before it.
        constant: whether its result is the same for all inputs of the model. Elementwise operators
            pass a parameter on only then: `weight * mask` is a weight, `x * scale` is none.

    Yields:
        (argument that is passed on, its new origin); an argument that is not, is consumed here.
    """
    node, name = call.node, call.name
    if node.op not in ("call_function", "call_method") or not node.args:
        return
    passes = name in SAME_VALUES or name == BATCH or call.views or call.looks_up
    if passes or (constant and name in REARRANGEMENTS):
        yield from _viewed(call, origins, constant)
    elif constant and name in PRODUCTS:
        yield from _multiplied(call, origins)
    elif constant and name in COMBINATIONS:
        for value, origin in _received(call, origins):
            yield value, _combined(call, origin, origins)
    elif constant and name in COPIES:
        yield from _copied(call, origins)
    elif constant and name in SCATTERS:
        yield from _scattered(call, origins)
    elif constant and name in MIXTURES:
        for value, origin in _received(call, origins):
            if value is node.args[0] and not origin.through:
                yield value, replace(origin, exact=False).moved(name)
    elif constant and call.elementwise:
        yield from _unbroadcast(call, origins)


def _received(call: Call, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """(argument, origin) of everything that a node receives of parameters."""
    for value in call.node.all_input_nodes:
        for origin in origins.get(value, ()):
            yield value, origin


def _viewed(call: Call, origins: Origins, constant: bool) -> Iterator[tuple[fx.Node, Origin]]:
    """What a view, a lookup or an operator that changes no value makes of its first argument."""
    first = call.node.args[0]
    if isinstance(first, fx.Node):
        for origin in origins.get(first, ()):
            if (passed := _pass_on(call, origin, constant)) is not None:
                yield first, passed


def _unbroadcast(call: Call, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """Arguments of the result's own shape: what is broadcast, scales or shifts the others."""
    received = list(_received(call, origins))
    shapes = [origin.view.shape for _, origin in received if isinstance(origin.view, Tensor)]
    result = call.shape or _broadcast(shapes)
    for value, origin in received:
        if isinstance(origin.view, Tensor) and origin.view.shape == result:
            yield value, _of_zeros(call, origin, origins)


def _of_zeros(call: Call, origin: Origin, origins: Origins) -> Origin:
    """What an elementwise operator makes of zeros: its value at them, with all else at a number.

    Where another argument holds the same elements, as in w + (round(w) - w), it is at zero, too.
    """
    name, node = call.name, call.node
    if name in SELECTIONS:
        return origin

    def at_zero(argument: fx.Node) -> Any:
        alike = [o.zero for o in origins.get(argument, ()) if _same_elements(o, origin)]
        known = argument.meta.get("val", argument.meta.get("example_value"))
        if not isinstance(known, Tensor | None):
            return 1
        dtype = torch.float32 if known is None else known.dtype
        number = alike[0] if alike else _constant(argument, origins)
        return torch.full((1, 1), number, dtype=dtype)

    args, kwargs = fx.map_arg((node.args, node.kwargs), at_zero)
    try:
        if node.op == "call_method":
            result = getattr(args[0], name)(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        return origin.moved(name, float(result))
    except (RuntimeError, TypeError, ValueError):
        return origin.moved(name)


def _same_elements(one: Origin, other: Origin) -> bool:
    """Whether two nodes hold the same element of one parameter at each place."""
    if one.parameter is not other.parameter or not isinstance(one.view, Tensor):
        return False
    places = [(o.view.shape, o.view.stride(), o.view.storage_offset()) for o in (one, other)]
    return places[0] == places[1]


def _constant(node: fx.Node, origins: Origins) -> float:
    """A number that stands for a constant: its own, or else one that is not special."""
    call = Call(node)
    while not origins.get(node) and call.views and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        call = Call(node)
    if held := origins.get(node):
        return 0.731 if held[0].number is None else held[0].number
    name, args = call.name, call.args
    filled = {"zeros": 0.0, "ones": 1.0, "full": args.get("fill_value")}
    value = next((filled[fill] for fill in filled if fill in name), None)
    if name in ("tensor", "scalar_tensor"):
        value = node.args[0]
    return float(value) if isinstance(value, int | float) else 0.731


def _copied(call: Call, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """What is copied over another tensor, in that one's shape where it is known."""
    value = call.node.args[-1]
    if not isinstance(value, fx.Node):
        return
    for origin in origins.get(value, ()):
        shape = call.shape if call.name != "setitem" else None
        if shape is None or origin.through or not isinstance(origin.view, Tensor):
            yield value, origin
        else:
            yield value, replace(origin, view=origin.view.expand(shape))


def _scattered(call: Call, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """A tensor, and what takes the place of a part of it."""
    base, source = call.node.args[:2]
    assert isinstance(base, fx.Node)
    assert isinstance(source, fx.Node)
    for origin in origins.get(base, ()):
        yield base, replace(origin, exact=False)
    shape = shape_of(base)
    region = None if shape is None else replay(call, region_of(shape))
    for origin in origins.get(source, ()):
        yield source, placed(origin, region) or mixed(call, origin)


def mixed(call: Call, origin: Origin) -> Origin:
    """The origin of what is computed from a parameter by an operator without a row."""
    return replace(origin, view=None, through=origin.through or call.name)


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The common shape; None where a trace without shapes left one of them unknown."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def _pass_on(call: Call, origin: Origin, constant: bool) -> Origin | None:
    name, node = call.name, call.node
    if origin.through:
        return origin
    if call.looks_up:
        return _picked(call, origin) if constant else _looked_up(call, origin)
    if name in REARRANGEMENTS:
        return _rearranged(call, origin)
    if name == BATCH:
        return _one_of_batch(origin, *node.args[1:2])
    if name in SAME_VALUES:
        quantized = origin.dequantized or name.startswith("dequantize")
        return replace(origin, dequantized=quantized)
    if node.target is operator.getitem and _is_pair(node.args[0]):
        return origin if node.args[1] == 0 else None
    return replay(call, origin)


def _is_pair(node: Any) -> bool:
    """Whether a node returns the weight and something else, such as its norms."""
    return operator_name(node) in SAME_VALUES | MIXTURES


def viewing(call: Call) -> Callable[[Any], Any] | None:
    """The view that a node takes of its first argument, or writes into.

    None where it depends on data.
    """
    node, name = call.node, call.name
    given = {"setitem": node.args[1:2], **dict.fromkeys(SCATTERS, node.args[2:])}
    rest = given.get(name, node.args[1:])
    try:
        args, kwargs = fx.map_arg((rest, node.kwargs), lambda arg: _value(arg, name))
    except ValueError:
        return None
    if name in ("T", "mT", "H", "mH"):
        return operator.attrgetter(name)
    target: Any = node.target
    if name == "setitem":
        target = operator.getitem
    elif name in SCATTERS:
        target = getattr(torch.ops.aten, name.removesuffix("_scatter"))
    elif node.op == "call_method":
        return operator.methodcaller(name, *args, **kwargs)
    return lambda view: target(view, *args, **kwargs)


def replay(call: Call, origin: Origin) -> Origin | None:
    """Apply a node's view; None where it depends on data."""
    if (apply := viewing(call)) is None:
        return None
    copy = origin.copied(origin.view.shape) if isinstance(origin.view, Tensor) else origin
    for start in (origin, copy):
        try:
            result = apply(start.view)
        except (ValueError, RuntimeError, IndexError, TypeError):
            continue  # a view of these strides is impossible, or of this shape
        if _shares(result, start.view):
            return replace(start, view=result)
    return None


def _shares(result: Any, view: Any) -> bool:
    parts = result if isinstance(result, tuple | list) else [result]
    return result is view or all(isinstance(t, Tensor) and t._is_view() for t in parts)


def _value(arg: fx.Node, name: str) -> int | Tensor:
    """An integer that the graph computes, or a tensor whose shape alone counts, as in `view_as`.

    Sizes that the graph does not note matter only to `expand`.
    """
    known = arg.meta.get("val", arg.meta.get("example_value"))
    if (shape := shape_of(arg)) is not None and name.endswith("_as"):
        return torch.empty(shape, device="meta")
    if isinstance(known, int | torch.SymInt):
        return known_size(known)
    if name == "expand":
        return 1
    raise ValueError(f"argument {arg.name} is not known before running")


def _looked_up(call: Call, origin: Origin) -> Origin | None:
    """Matrices picked from a stack by one index are still matrices; rows picked are results."""
    view = origin.view
    if call.name == "gather" or not isinstance(view, Tensor) or view.ndim < 3:
        return None
    if (place := _place_of_index(call, view)) is None:
        return None
    dim, index = place
    copy = origin.copied(view.shape)
    picked = shape_of(index) or (1,)
    shape = (*view.shape[:dim], *picked, *view.shape[dim + 1 :])
    strides = copy.view.stride()
    strides = (*strides[:dim], *[0] * len(picked), *strides[dim + 1 :])
    return replace(copy, view=copy.view.as_strided(shape, strides), exact=False)


def _place_of_index(call: Call, view: Tensor) -> tuple[int, fx.Node] | None:
    """(axis, index) of a lookup along one axis; None for others."""
    args = call.args
    if call.name in ("index_select", "gather"):
        return args["dim"] % view.ndim, args["index"]
    places = [i for i, index in enumerate(args["indices"]) if isinstance(index, fx.Node)]
    rest = [index for index in args["indices"] if not isinstance(index, fx.Node)]
    if len(places) != 1 or any(index not in (None, slice(None)) for index in rest):
        return None
    return places[0], args["indices"][places[0]]


def _picked(call: Call, origin: Origin) -> Origin | None:
    """What an index picks that is the same for all inputs: the axes, one of them in its order."""
    view = origin.view
    place = _place_of_index(call, view) if isinstance(view, Tensor) else None
    picked = None if place is None else shape_of(place[1])
    if place is None or picked is None or place[0] >= view.ndim:
        return None
    dim, shape = place[0], (*view.shape[: place[0]], *picked, *view.shape[place[0] + 1 :])
    result = call.shape or shape  # how many a mask picks, may not be known
    if call.name == "gather" and len(picked) == view.ndim:
        return replace(origin.copied(picked), exact=False, reordered=frozenset((dim,)))
    if len(result) != len(shape):
        return None
    rows = result[dim : dim + len(picked)]  # a mask as an index has more elements than it picks
    copy = origin.copied((*view.shape[:dim], math.prod(rows), *view.shape[dim + 1 :]))
    return replace(
        copy, view=copy.view.unflatten(dim, rows), exact=False, reordered=frozenset((dim,))
    )


def _rearranged(call: Call, origin: Origin) -> Origin | None:
    """What an operator makes of a constant that moves or repeats whole slices along its axes."""
    view, apply = origin.view, viewing(call)
    if apply is None or not isinstance(view, Tensor):
        return None
    shape = apply(view).shape
    new = len(shape) - view.ndim
    if new < 0:
        return None
    reordered = {
        axis + new
        for axis, size in enumerate(view.shape)
        if not _keeps_order(apply, axis, size, view.ndim)
    }
    wider = replace(origin, view=view[(None,) * new])
    return replace(wider.copied(shape), exact=False, reordered=frozenset(reordered))


def _keeps_order(apply: Callable[[Any], Any], axis: int, size: int, ndim: int) -> bool:
    """Whether indices along one axis are where they were; tried on the indices themselves."""
    shape = [size if dim == axis else 1 for dim in range(ndim)]
    indices = torch.arange(1, size + 1, dtype=torch.float32).view(shape)
    found = apply(indices)
    found = found.movedim(axis - ndim, 0).flatten(1)
    return len(found) == size and bool((found == indices.flatten()[:, None]).any(1).all())


def _one_of_batch(origin: Origin, dim: Any = 0) -> Origin | None:
    """A slice that stands for each of a batch, as in `torch.vmap`."""
    if not isinstance(origin.view, Tensor):
        return None
    copy = origin.copied(origin.view.shape)
    return replace(copy, view=copy.view.select(dim, 0), exact=False, reordered=frozenset((dim,)))


def _multiplied(call: Call, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """Factors of a product of constants, as parts of their product."""
    shape, name, row = call.shape, call.name, call.row
    assert row is not None  # every product has one
    bias = call.args.get(row.bias)
    for value, origin in _received(call, origins):
        whole = isinstance(origin.view, Tensor) and origin.view.shape == shape
        if value is bias and whole:
            yield value, replace(origin, exact=False).moved(name)
    for _, value, axes in row.find(call.args):
        for origin in origins.get(value, ()):
            if origin.through or shape is None or not isinstance(origin.view, Tensor):
                yield value, mixed(call, origin)
            elif 2 <= origin.view.ndim <= len(shape):
                yield value, _factor(name, origin, axes, shape)


def _factor(name: str, origin: Origin, axes: Axes, shape: Sequence[int]) -> Origin:
    """The origin of a product of `shape`, of which this is a factor with these axes."""
    (kept,), (summed,) = ([a for a in axes if axes[a] == role] for role in ("out", "in"))
    assert kept is not None
    assert summed is not None
    copy = origin.copied(origin.view.shape)
    ndim, own = len(shape), copy.view.stride()
    strides = [0] * (ndim - len(own)) + list(own)
    strides[-2:] = [0, 0]
    strides[-2 if axes == LEFT_FACTOR else -1] = own[kept]
    view = copy.view.as_strided(shape, strides)
    factor = replace(copy, view=view, exact=False, summed=frozenset((summed % len(own),)))
    return factor.moved(name)


def _combined(call: Call, origin: Origin, origins: Origins) -> Origin:
    """Placed beside other tensors: the same axes, one of them longer or new."""
    if origin.through or not isinstance(origin.view, Tensor):
        return origin
    node = call.node
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    if call.name == "stack":
        copy = origin.copied(origin.view.shape)
        return replace(copy, view=copy.view.unsqueeze(dim), exact=False)
    shape = list(origin.view.shape)
    parts = [origins[value][0].view for value in node.all_input_nodes if origins.get(value)]
    noted = call.shape
    total = sum(part.shape[dim] for part in parts if isinstance(part, Tensor))
    shape[dim] = noted[dim] if noted else total
    return replace(origin.copied(shape), exact=False)


def reduced_by(call: Call, origin: Origin) -> str:
    """The operator that sums what an elementwise one makes of activations and a parameter.

    A product that is summed along an axis of the parameter is a dot product, a difference that is
    a distance: neither scales nor shifts alone. Empty where nothing sums.
    """
    name, shape, view = call.name, call.shape, origin.view
    if name not in SCALINGS | DIFFERENCES or shape is None or not isinstance(view, Tensor):
        return ""
    varies = {
        axis - view.ndim
        for axis, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True))
        if size > 1 and stride > 0
    }
    pending, seen = [*call.node.users], {call.node}
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        reader = Call(user)
        if reader.name in REDUCTIONS:
            dims = reader.args.get("dim")
            dims = [dims] if isinstance(dims, int) else dims or range(len(shape))
            if varies & {dim - len(shape) if dim >= 0 else dim for dim in dims}:
                return reader.name
        elif reader.shape == shape and _goes_on(reader, name in DIFFERENCES):
            pending += user.users
    return ""


def _goes_on(call: Call, difference: bool) -> bool:
    """Whether a product, or the power of a difference, is still one after another operator."""
    name, user = call.name, call.node
    scales = name in SCALINGS and sum(isinstance(arg, fx.Node) for arg in user.args) == len(
        user.all_input_nodes
    )  # a product with itself is a power
    return name in SAME_VALUES or scales or (difference and name in POWERS)
