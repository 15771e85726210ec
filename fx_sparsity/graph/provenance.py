"""Follows a parameter to its consumers, and reads its axes' roles off the strides that arrive.

The view chain (t, permute, chunk, select, ...) is replayed on a meta tensor of the parameter's
shape. Where an operator consumes the result, each of its axes has a stride, and a stride points
back at the dimension of the parameter that it walks along. Where a chain has to copy, a fresh meta
tensor takes over and remembers the view that it was copied from. One code path for packed
projections, stacked experts and transposed storage; no copy of any data.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fx_sparsity.graph.compiled import real_tensors
from fx_sparsity.graph.operators import (
    BATCH,
    COMBINATIONS,
    COPIES,
    DIFFERENCES,
    LEFT_FACTOR,
    MIXTURES,
    OPERATORS,
    POWERS,
    PRODUCTS,
    REARRANGEMENTS,
    REDUCTIONS,
    SAME_VALUES,
    SCALINGS,
    SCATTERS,
    SELECTIONS,
    Axes,
    bind,
    is_elementwise,
    is_lookup,
    is_view,
    operator_name,
)
from fx_sparsity.graph.sources import place_of
from fx_sparsity.patterns import Role


@dataclass(frozen=True)
class Origin:
    """What a node holds: a view of a parameter, or of a copy of such a view.

    Attributes:
        fqn: canonical name of the parameter.
        parameter: contiguous meta tensor; of the parameter's shape, or of the copy's.
        view: the same storage as this node sees it (a sequence for split and chunk).
        dequantized: whether a dequantize operator lies between.
        before: what was copied; axis i of its view became dimension i of `parameter`. None where
            `parameter` is the parameter itself.
        exact: whether what arrives is this view and nothing else: neither picked from it by an
            index, nor placed beside other tensors.
        reordered: dimensions of the copy along which it holds the elements of what was copied in
            another order, more than once, or beside others.
        summed: dimensions of the copy that a product of constants has summed over since.
        zero: what becomes of a zero of the parameter on the way; NaN where no number says it.
        moved_by: the operator that made it so, where it is no zero any more.
        number: the value of a constant of one element, where it is known.
        through: an operator on the way that mixes elements, so that no axis can be known any more.
    """

    fqn: str
    parameter: Tensor
    view: Any
    dequantized: bool = False
    before: "Origin | None" = None
    exact: bool = True
    reordered: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()
    zero: float = 0.0
    moved_by: str = ""
    number: float | None = None
    through: str = ""

    def moved(self, op: str, zero: float = math.nan) -> "Origin":
        """The origin after an operator that makes `zero` of what zeros have become."""
        first = self.moved_by or op
        return replace(self, zero=zero, moved_by="" if zero == 0 else first, number=None)

    @property
    def is_factor(self) -> bool:
        """Whether the parameter is but a factor of this, in a product of constants."""
        return bool(self.summed) or (self.before is not None and self.before.is_factor)

    def copied(self, shape: Sequence[int]) -> "Origin":
        """The origin of a contiguous tensor whose axes are, one by one, those of this view."""
        fresh = self.view.new_empty(shape)
        none: frozenset[int] = frozenset()
        return replace(self, parameter=fresh, view=fresh, before=self, reordered=none, summed=none)


Origins = Mapping[fx.Node, Sequence[Origin]]


def origin_of(fqn: str, tensor: Tensor) -> Origin:
    """The origin of a node that is the parameter itself."""
    meta = torch.empty(tensor.shape, device="meta", dtype=tensor.dtype)
    known = tensor.numel() == 1 and not tensor.is_complex() and place_of(tensor) is not None
    with real_tensors():
        return Origin(fqn, meta, meta, number=float(tensor) if known else None)


def follow(node: fx.Node, origins: Origins, constant: bool) -> Iterator[tuple[fx.Node, Origin]]:
    """What `node` passes on of the parameters that it receives.

    Args:
        node: of the graph.
        origins: of the nodes before it.
        constant: whether `node` is the same for all inputs of the model. Elementwise operators
            pass a parameter on only then: `weight * mask` is a weight, `x * scale` is none.

    Yields:
        (argument that is passed on, its new origin); an argument that is not, is consumed here.
    """
    if node.op not in ("call_function", "call_method") or not node.args:
        return
    name = operator_name(node)
    passes = name in SAME_VALUES or name == BATCH or is_view(node) or is_lookup(node)
    if passes or (constant and name in REARRANGEMENTS):
        yield from _viewed(node, name, origins, constant)
    elif constant and name in PRODUCTS:
        yield from _multiplied(node, origins)
    elif constant and name in COMBINATIONS:
        for value, origin in _received(node, origins):
            yield value, _combined(node, name, origin, origins)
    elif constant and name in COPIES:
        yield from _copied(node, origins)
    elif constant and name in SCATTERS:
        yield from _scattered(node, origins)
    elif constant and name in MIXTURES:
        for value, origin in _received(node, origins):
            if value is node.args[0] and not origin.through:
                yield value, replace(origin, exact=False).moved(name)
    elif constant and is_elementwise(node):
        yield from _unbroadcast(node, origins)


def _received(node: fx.Node, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """(argument, origin) of everything that a node receives of parameters."""
    for value in node.all_input_nodes:
        for origin in origins.get(value, ()):
            yield value, origin


def _viewed(
    node: fx.Node, name: str, origins: Origins, constant: bool
) -> Iterator[tuple[fx.Node, Origin]]:
    """What a view, a lookup or an operator that changes no value makes of its first argument."""
    first = node.args[0]
    if isinstance(first, fx.Node):
        for origin in origins.get(first, ()):
            if (passed := _pass_on(node, name, origin, constant)) is not None:
                yield first, passed


def _unbroadcast(node: fx.Node, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """Arguments of the result's own shape: what is broadcast, scales or shifts the others."""
    received = list(_received(node, origins))
    shapes = [origin.view.shape for _, origin in received if isinstance(origin.view, Tensor)]
    result = shape_of(node) or _broadcast(shapes)
    for value, origin in received:
        if isinstance(origin.view, Tensor) and origin.view.shape == result:
            yield value, _of_zeros(node, origin, origins)


def _of_zeros(node: fx.Node, origin: Origin, origins: Origins) -> Origin:
    """What an elementwise operator makes of zeros: its value at them, with all else at a number.

    Where another argument holds the same elements, as in w + (round(w) - w), it is at zero, too.
    """
    name = operator_name(node)
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
    while not origins.get(node) and is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if held := origins.get(node):
        return 0.731 if held[0].number is None else held[0].number
    name, args = operator_name(node), bind(node)
    filled = {"zeros": 0.0, "ones": 1.0, "full": args.get("fill_value")}
    value = next((filled[fill] for fill in filled if fill in name), None)
    if name in ("tensor", "scalar_tensor"):
        value = node.args[0]
    return float(value) if isinstance(value, int | float) else 0.731


def _copied(node: fx.Node, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """What is copied over another tensor, in that one's shape where it is known."""
    value = node.args[-1]
    if not isinstance(value, fx.Node):
        return
    for origin in origins.get(value, ()):
        shape = shape_of(node) if operator_name(node) != "setitem" else None
        if shape is None or origin.through or not isinstance(origin.view, Tensor):
            yield value, origin
        else:
            yield value, replace(origin, view=origin.view.expand(shape))


def _scattered(node: fx.Node, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """A tensor, and what takes the place of a part of it."""
    base, source = node.args[:2]
    assert isinstance(base, fx.Node)
    assert isinstance(source, fx.Node)
    for origin in origins.get(base, ()):
        yield base, replace(origin, exact=False)
    shape = shape_of(base)
    region = None if shape is None else replay(node, region_of(shape))
    for origin in origins.get(source, ()):
        yield source, placed(origin, region) or mixed(node, origin)


def region_of(shape: Sequence[int]) -> Origin:
    """All of a tensor that is written into."""
    whole = torch.empty(shape, device="meta")
    return Origin("", whole, whole)


def placed(origin: Origin, region: Origin | None) -> Origin | None:
    """The origin of a whole tensor into whose `region` a tensor is written.

    Its axes are those of the region, as long as the whole's. None where that is not known.
    """
    if origin.through or region is None or region.before is not None:
        return None
    view, whole = region.view, region.parameter
    along = [axes_along(region, dim) for dim in range(whole.ndim)]
    axes = [axis for found in along for axis in found]
    try:
        spread = origin.view.expand(view.shape)
    except (AttributeError, RuntimeError):
        return None  # shapes that are not known, or several tensors
    if len(axes) > len(set(axes)) or any(len(found) > 1 for found in along):
        return None
    shape = list(view.shape)
    for size, found in zip(whole.shape, along, strict=True):
        for axis in found:
            shape[axis] = size
    copy = replace(origin, view=spread).copied(shape)
    strides = [copy.view.stride(found[0]) if found else 0 for found in along]
    return replace(copy, view=copy.view.as_strided(whole.shape, strides), exact=False)


def mixed(node: fx.Node, origin: Origin) -> Origin:
    """The origin of what is computed from a parameter by an operator without a row."""
    return replace(origin, view=None, through=origin.through or operator_name(node))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor, with hints for dynamic sizes; None where its graph notes none."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor):
        return None
    try:
        return tuple(_known(size) for size in value.shape)
    except ValueError:
        return None


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The common shape; None where a trace without shapes left one of them unknown."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def _pass_on(node: fx.Node, name: str, origin: Origin, constant: bool) -> Origin | None:
    if origin.through:
        return origin
    if is_lookup(node):
        return _picked(node, origin) if constant else _looked_up(node, origin)
    if name in REARRANGEMENTS:
        return _rearranged(node, origin)
    if name == BATCH:
        return _one_of_batch(origin, *node.args[1:2])
    if name in SAME_VALUES:
        quantized = origin.dequantized or name.startswith("dequantize")
        return replace(origin, dequantized=quantized)
    if node.target is operator.getitem and _is_pair(node.args[0]):
        return origin if node.args[1] == 0 else None
    return replay(node, origin)


def _is_pair(node: Any) -> bool:
    """Whether a node returns the weight and something else, such as its norms."""
    return operator_name(node) in SAME_VALUES | MIXTURES


def viewing(node: fx.Node) -> Callable[[Any], Any] | None:
    """The view that a node takes of its first argument, or writes into.

    None where it depends on data.
    """
    name = operator_name(node)
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


def replay(node: fx.Node, origin: Origin) -> Origin | None:
    """Apply a node's view; None where it depends on data."""
    if (apply := viewing(node)) is None:
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
        return _known(known)
    if name == "expand":
        return 1
    raise ValueError(f"argument {arg.name} is not known before running")


def _known(size: int | torch.SymInt) -> int:
    """A size, by its hint where it is dynamic: asking for its value would specialize the graph."""
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            raise ValueError(f"size {size} is not known before running")
        return int(size.node.hint)
    return size


def _looked_up(node: fx.Node, origin: Origin) -> Origin | None:
    """Matrices picked from a stack by one index are still matrices; rows picked are results."""
    view = origin.view
    if operator_name(node) == "gather" or not isinstance(view, Tensor) or view.ndim < 3:
        return None
    if (place := _place_of_index(node, view)) is None:
        return None
    dim, index = place
    copy = origin.copied(view.shape)
    picked = shape_of(index) or (1,)
    shape = (*view.shape[:dim], *picked, *view.shape[dim + 1 :])
    strides = copy.view.stride()
    strides = (*strides[:dim], *[0] * len(picked), *strides[dim + 1 :])
    return replace(copy, view=copy.view.as_strided(shape, strides), exact=False)


def _place_of_index(node: fx.Node, view: Tensor) -> tuple[int, fx.Node] | None:
    """(axis, index) of a lookup along one axis; None for others."""
    args = bind(node)
    if operator_name(node) in ("index_select", "gather"):
        return args["dim"] % view.ndim, args["index"]
    places = [i for i, index in enumerate(args["indices"]) if isinstance(index, fx.Node)]
    rest = [index for index in args["indices"] if not isinstance(index, fx.Node)]
    if len(places) != 1 or any(index not in (None, slice(None)) for index in rest):
        return None
    return places[0], args["indices"][places[0]]


def _picked(node: fx.Node, origin: Origin) -> Origin | None:
    """What an index picks that is the same for all inputs: the axes, one of them in its order."""
    view = origin.view
    place = _place_of_index(node, view) if isinstance(view, Tensor) else None
    picked = None if place is None else shape_of(place[1])
    if place is None or picked is None or place[0] >= view.ndim:
        return None
    dim, shape = place[0], (*view.shape[: place[0]], *picked, *view.shape[place[0] + 1 :])
    result = shape_of(node) or shape  # how many a mask picks, may not be known
    if operator_name(node) == "gather" and len(picked) == view.ndim:
        return replace(origin.copied(picked), exact=False, reordered=frozenset((dim,)))
    if len(result) != len(shape):
        return None
    rows = result[dim : dim + len(picked)]  # a mask as an index has more elements than it picks
    copy = origin.copied((*view.shape[:dim], math.prod(rows), *view.shape[dim + 1 :]))
    return replace(
        copy, view=copy.view.unflatten(dim, rows), exact=False, reordered=frozenset((dim,))
    )


def _rearranged(node: fx.Node, origin: Origin) -> Origin | None:
    """What an operator makes of a constant that moves or repeats whole slices along its axes."""
    view, apply = origin.view, viewing(node)
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


def _multiplied(node: fx.Node, origins: Origins) -> Iterator[tuple[fx.Node, Origin]]:
    """Factors of a product of constants, as parts of their product."""
    shape, args = shape_of(node), bind(node)
    bias = args.get(OPERATORS[operator_name(node)].bias)
    for value, origin in _received(node, origins):
        whole = isinstance(origin.view, Tensor) and origin.view.shape == shape
        if value is bias and whole:
            yield value, replace(origin, exact=False).moved(operator_name(node))
    for _, value, axes in OPERATORS[operator_name(node)].find(args):
        for origin in origins.get(value, ()):
            if origin.through or shape is None or not isinstance(origin.view, Tensor):
                yield value, mixed(node, origin)
            elif 2 <= origin.view.ndim <= len(shape):
                yield value, _factor(operator_name(node), origin, axes, shape)


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


def _combined(node: fx.Node, name: str, origin: Origin, origins: Origins) -> Origin:
    """Placed beside other tensors: the same axes, one of them longer or new."""
    if origin.through or not isinstance(origin.view, Tensor):
        return origin
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    if name == "stack":
        copy = origin.copied(origin.view.shape)
        return replace(copy, view=copy.view.unsqueeze(dim), exact=False)
    shape = list(origin.view.shape)
    parts = [origins[value][0].view for value in node.all_input_nodes if origins.get(value)]
    noted = shape_of(node)
    total = sum(part.shape[dim] for part in parts if isinstance(part, Tensor))
    shape[dim] = noted[dim] if noted else total
    return replace(origin.copied(shape), exact=False)


def roles_of_parameter(origin: Origin, axes: Axes) -> tuple[Role, ...] | None:
    """Roles of the parameter's own dimensions, from those of the axes that an operator sees.

    Args:
        origin: its `view` is what the operator consumes.
        axes: axis of the view -> role.

    Returns:
        One role a dimension, or None where a dimension is both reduced and kept.
    """
    view, parameter = origin.view, origin.parameter
    rest = axes.get(None, "batch")
    by_axis: dict[int, Role] = {
        axis % view.ndim: role
        for axis, role in axes.items()
        if axis is not None and -view.ndim <= axis < view.ndim
    }
    single = [by_axis.get(axis, rest) for axis, size in enumerate(view.shape) if size == 1]
    roles: list[Role] = []
    for dim, size in enumerate(parameter.shape):
        found = {by_axis.get(axis, rest) for axis in axes_along(origin, dim)}
        if len(found) > 1:
            found.discard("batch")
        if len(found) > 1:
            return None
        if found:
            roles.append(found.pop())
        elif size == 1 and view.shape == parameter.shape:
            roles.append(by_axis.get(dim, rest))
        elif size == 1 and len(single) == 1 and list(parameter.shape).count(1) == 1:
            roles.append(single[0])  # strides say nothing of an axis of one, but there is only one
        else:
            roles.append("batch")
    for dim in origin.summed:
        # What is left of a product x @ (a @ b) = (x @ a) @ b: the other end of its own layer.
        ends = [role for role in roles if role in _OTHER_END]
        if len(ends) != 1:
            return None
        roles[dim] = _OTHER_END[ends[0]]
    if origin.before is not None:
        return roles_of_parameter(origin.before, dict(enumerate(roles)))
    return tuple(roles)


_OTHER_END: dict[Role, Role] = {"out": "in", "in": "out"}


def reordered_dimensions(origin: Origin) -> tuple[int, ...]:
    """Dimensions of the parameter along which the view is not in the order of its storage."""
    view, own = origin.view, origin.parameter
    found = set(origin.reordered | origin.summed)
    for dim in range(own.ndim):
        strides = [view.stride(axis) for axis in axes_along(origin, dim)]
        if strides and min(strides) > own.stride(dim):
            found.add(dim)
    before = origin.before
    if before is None:
        return tuple(sorted(found))
    dims = range(before.parameter.ndim)
    earlier = {dim for dim in dims if found.intersection(axes_along(before, dim))}
    return tuple(sorted(earlier.union(reordered_dimensions(before))))


def axes_along(origin: Origin, dim: int) -> list[int]:
    """Axes of the view that walk along dimension `dim` of the parameter.

    An axis of stride t and size s visits multiples of t below t * s; a dimension of stride u and
    size n owns the multiples of u below u * n. They meet where these ranges overlap.
    """
    view, parameter = origin.view, origin.parameter
    low = parameter.stride(dim)
    high = low * parameter.shape[dim]
    return [
        axis
        for axis, (stride, size) in enumerate(zip(view.stride(), view.shape, strict=True))
        if size > 1 and stride > 0 and max(stride, low) < min(stride * size, high)
    ]


def reduced_by(node: fx.Node, origin: Origin) -> str:
    """The operator that sums what an elementwise one makes of activations and a parameter.

    A product that is summed along an axis of the parameter is a dot product, a difference that is
    a distance: neither scales nor shifts alone. Empty where nothing sums.
    """
    name, shape = operator_name(node), shape_of(node)
    view = origin.view
    if name not in SCALINGS | DIFFERENCES or shape is None or not isinstance(view, Tensor):
        return ""
    varies = {
        axis - view.ndim
        for axis, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True))
        if size > 1 and stride > 0
    }
    pending, seen = [*node.users], {node}
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if operator_name(user) in REDUCTIONS:
            dims = bind(user).get("dim")
            dims = [dims] if isinstance(dims, int) else dims or range(len(shape))
            if varies & {dim - len(shape) if dim >= 0 else dim for dim in dims}:
                return operator_name(user)
        elif shape_of(user) == shape and _goes_on(user, name in DIFFERENCES):
            pending += user.users
    return ""


def _goes_on(user: fx.Node, difference: bool) -> bool:
    """Whether a product, or the power of a difference, is still one after another operator."""
    name = operator_name(user)
    scales = name in SCALINGS and sum(isinstance(arg, fx.Node) for arg in user.args) == len(
        user.all_input_nodes
    )  # a product with itself is a power
    return name in SAME_VALUES or scales or (difference and name in POWERS)


def slice_of_parameter(origin: Origin) -> tuple[int, int, int] | None:
    """(dimension, start, stop) of the part of the parameter that the view covers; None for all.

    What is cut off after a copy is not known: the part is then a larger one, never a smaller.
    """
    while origin.before is not None:
        origin = origin.before
    view, parameter = origin.view, origin.parameter
    if view.numel() >= parameter.numel():
        return None
    for dim, size in enumerate(parameter.shape):
        stride = parameter.stride(dim)
        start = view.storage_offset() // stride % size
        length = _extent(view.stride(), view.shape, stride, stride * size)
        if length < size:
            return dim, start, start + length
    return None


def _extent(strides: Sequence[int], sizes: Sequence[int], low: int, high: int) -> int:
    """How many steps of `low` the axes whose strides lie in [low, high) cover."""
    last = sum(
        (size - 1) * stride
        for stride, size in zip(strides, sizes, strict=True)
        if low <= stride < high
    )
    return last // low + 1
