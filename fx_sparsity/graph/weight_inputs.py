"""The inputs of a weight at one call of an operator: the columns of activations that it multiplies.

One small function an operator, a column of the operator table. Each is given the call's arguments,
and in the place of the weight a tensor of the same shape that tells of every element which column
of the weight's matrix form it belongs to. Whatever the operator does with the weight's axes is done
with that tensor, so that packed, transposed, stacked and picked weights need no code of their own.
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_sparsity.errors import FxSparsityError

Arguments = Mapping[str, Any]


class WeightInputs(NamedTuple):
    """Activations that a weight was multiplied with, or rows of it that were looked up.

    Attributes:
        columns: which columns of the weight's matrix form: int64, [groups, in]; -1 is none of them.
        x: activations: [groups, tokens, in]; None for a lookup.
        counts: for a lookup, the sums of its coefficients and of their squares: float32,
            [2, groups, in]; [i, g, j] belongs to column [g, j].
        tokens: how many there were.
        out: how many outputs of the weight had them; a slice of it has fewer than the whole.
    """

    columns: Tensor
    x: Tensor | None
    counts: Tensor | None
    tokens: int
    out: int


InputsOf = Callable[[Arguments, str, Tensor], Iterator[WeightInputs]]
"""(the call's arguments by name, the argument that receives the weight, columns) -> its inputs.

The columns are int64, of the shape of what the operator receives as the weight. Raises
`UnsupportedUse` where the inputs of this call cannot be known.
"""


class UnsupportedUse(FxSparsityError, ValueError):
    """No function here tells the inputs of a weight in this use."""


def _product(x: Tensor, columns: Tensor) -> Iterator[WeightInputs]:
    """`x @ W`, as `torch.matmul` broadcasts it.

    Args:
        x: [..., tokens, in] or [in].
        columns: [..., in, out] or [in].
    """
    x = x.unsqueeze(0) if x.ndim == 1 else x
    columns, out = _outputs(columns.unsqueeze(-1) if columns.ndim == 1 else columns)
    if columns.ndim == 1:
        flat = x.reshape(1, -1, x.shape[-1])
        yield WeightInputs(columns.unsqueeze(0), flat, None, flat.shape[1], out)
        return
    batch = torch.broadcast_shapes(x.shape[:-2], columns.shape[:-1])
    flat = x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
    columns = columns.expand(*batch, columns.shape[-1]).reshape(-1, columns.shape[-1])
    yield WeightInputs(columns, flat, None, flat.shape[1], out)


def _outputs(columns: Tensor) -> tuple[Tensor, int]:
    """(columns of one output, how many outputs), of columns that are [..., in, out].

    Beside a weight there may lie outputs of another tensor, and beside those no weight.
    """
    if columns.stride(-1) == 0 or columns.shape[-1] == 1:
        return columns[..., 0], columns.shape[-1]
    found = columns.amax(-1)
    return found, int((columns >= 0).sum(-1).max())


def right(other: str) -> InputsOf:
    """The weight is the right factor; `other` names the left one."""
    return lambda args, arg, columns: _product(args[other], columns)


def left(other: str) -> InputsOf:
    """The weight is the left factor; `other` names the right one."""

    def inputs(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
        x = args[other]
        return _product(x.unsqueeze(0) if x.ndim == 1 else x.mT, _transposed(columns))

    return inputs


def _transposed(columns: Tensor) -> Tensor:
    return columns if columns.ndim == 1 else columns.mT


def either(**others: InputsOf) -> InputsOf:
    """By the argument that receives the weight."""
    return lambda args, arg, columns: others[arg](args, arg, columns)


def linear(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """Either argument may be the weight; the operator reduces the last axis of both."""
    return _product(args["input" if arg == "weight" else "weight"], _transposed(columns))


def inner(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """Both factors are reduced along their last axis."""
    return _product(args["self" if arg == "other" else "other"], _transposed(columns))


def summed(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """A sum over the products of a batch reduces that, too: one product of longer rows."""
    if arg == "batch2":
        x = args["batch1"].movedim(1, 0).flatten(1)
        return _product(x, columns.flatten(0, 1))
    x = args["batch2"].movedim(2, 0).flatten(1)
    return _product(x, columns.movedim(1, -1).flatten(0, 1))


def grouped(x: str, weight_offsets: str) -> InputsOf:
    """Each matrix of a stack has the rows of `x` up to its offset."""

    def inputs(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
        rows, offsets = args[x], args.get(weight_offsets)
        if columns.ndim != 3 or rows.ndim != 2 or offsets is None:
            raise UnsupportedUse(f"a grouped product of {rows.ndim} and {columns.ndim} dimensions")
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            routed = rows[start:end].unsqueeze(0)
            mine, out = _outputs(columns[expert])
            yield WeightInputs(mine.unsqueeze(0), routed, None, end - start, out)
            start = end

    return inputs


def bilinear(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """Each pair of an element of one input and an element of the other is a column."""
    pairs = args["input1"].unsqueeze(-1) * args["input2"].unsqueeze(-2)
    flat = pairs.reshape(1, -1, pairs.shape[-1] * pairs.shape[-2])
    mine, out = _outputs(columns.flatten(1).t())
    yield WeightInputs(mine.unsqueeze(0), flat, None, flat.shape[1], out)


def trilinear(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """What `bilinear` consists of; any other sum of three factors is unknown here."""
    if [args[f"expand{i}"] for i in (1, 2, 3)] != [[1, 3], [0], [1, 2]]:
        raise UnsupportedUse("a product of three factors that is not bilinear")
    return bilinear({"input1": args["i1"], "input2": args["i3"]}, arg, columns)


def einsum(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """The other operands, multiplied and arranged as [batch, tokens, in] of the weight."""
    place = int(arg.removeprefix("tensors[").removesuffix("]"))
    equation, operands = args["equation"].replace(" ", ""), args["tensors"]
    terms, result = _without_ellipsis(equation, [operand.ndim for operand in operands], place)
    weight = terms.pop(place)
    others = [operand for i, operand in enumerate(operands) if i != place]
    inner = [c for c in weight if c not in result]
    shared = "".join(terms)
    if len({*weight}) < len(weight) or any(c not in shared for c in inner):
        raise UnsupportedUse(f"einsum {equation!r} reduces its weight alone")
    batch = [c for c in weight if c in result and c in shared]
    out = [c for c in weight if c in result and c not in shared]
    tokens = [c for c in result if c not in weight]
    x = torch.einsum(",".join(terms) + "->" + "".join([*batch, *tokens, *inner]), *others)
    size = dict(zip(weight, columns.shape, strict=True))
    groups = _count(size[c] for c in batch)
    columns = columns.permute([weight.index(c) for c in [*batch, *out, *inner]])
    columns = columns.reshape(groups, _count(size[c] for c in out), -1)
    mine, outputs = _outputs(columns.mT)
    x = x.reshape(groups, -1, mine.shape[1])
    yield WeightInputs(mine, x, None, x.shape[1], outputs)


def _count(sizes: Iterator[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _without_ellipsis(equation: str, ranks: Sequence[int], weight: int) -> tuple[list[str], str]:
    """Terms and result of an equation, with letters for what an ellipsis stands for."""
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        found = "".join(terms).replace(".", "")
        once = sorted(c for c in found if found.count(c) == 1)
        result = ("..." if "..." in inputs else "") + "".join(once)
    free = [c for c in string.ascii_letters if c not in equation]
    spans = [rank - len(term) + 3 for term, rank in zip(terms, ranks, strict=True)]
    wide = [span for term, span in zip(terms, spans, strict=True) if "..." in term]
    if "..." in terms[weight] or len(set(wide)) > 1:
        raise UnsupportedUse(f"einsum {equation!r}, whose ellipsis is not that of activations")
    letters = "".join(free[: wide[0]]) if wide else ""
    return [term.replace("...", letters) for term in terms], result.replace("...", letters)


def convolution(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """Windows of the padded input, one for each position of the result.

    A transposed convolution is one over its input spread out by the stride, kernel reversed
    (Dumoulin and Visin, arXiv 1603.07285).
    """
    x, dims = args["input"], columns.ndim - 2
    x = x.unsqueeze(0) if x.ndim == dims + 1 else x
    stride, dilation = _each(args.get("stride"), 1, dims), _each(args.get("dilation"), 1, dims)
    reach = [d * (k - 1) for d, k in zip(dilation, columns.shape[2:], strict=True)]
    groups = args.get("groups", 1)
    padding = args.get("padding", 0)
    if args["transposed"]:
        x = _spread(x, stride)
        more = _each(args.get("output_padding"), 0, dims)
        sides = [
            (r - p, r - p + m) for r, p, m in zip(reach, _each(padding, 0, dims), more, strict=True)
        ]
        stride = [1] * dims
        columns = columns.unflatten(0, (groups, -1)).movedim(2, -1)
        columns = columns.flip(list(range(2, columns.ndim - 1)))
    else:
        if isinstance(padding, str):
            sides = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
        else:
            sides = [(p, p) for p in _each(padding, 0, dims)]
        columns = columns.unflatten(0, (groups, -1)).movedim(1, -1)
    x = F.pad(x, [side for pair in reversed(sides) for side in pair])
    for axis, (r, s, d) in enumerate(zip(reach, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, r + 1, s)[..., ::d]
    # [n, channels, positions..., kernel...] -> [groups, n, positions..., in, kernel...]
    x = x.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, 2 + dims)
    mine, out = _outputs(columns)  # of [groups, in, kernel..., out]
    x = x.reshape(groups, -1, mine[0].numel())
    yield WeightInputs(mine.flatten(1), x, None, x.shape[1], out)


def convolution_of(transposed: bool) -> InputsOf:
    """A convolution whose operator says by its name whether it is transposed."""
    return lambda args, arg, columns: convolution({**args, "transposed": transposed}, arg, columns)


def _each(value: Any, default: int, dims: int) -> list[int]:
    """One number a dimension, from a number, a list, or a list of one."""
    values = [default] if value is None else [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Put `stride - 1` zeros between neighbours."""
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return spread


def _lookup(columns: Tensor, rows: Tensor, coefficients: Tensor | None = None) -> WeightInputs:
    """Rows of a table that were looked up, each once, or with a coefficient.

    Args:
        columns: int64, [dim, rows].
        rows: int64, any shape.
        coefficients: float32, of its shape.
    """
    mine, out = _outputs(columns.mT)
    rows, last = rows.reshape(-1), len(mine) - 1
    if len(rows) and not -last - 1 <= int(rows.min()) <= int(rows.max()) <= last:
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a table of {last + 1}")
    rows = rows.remainder(len(mine))
    ones = torch.ones_like(rows, dtype=torch.float32)
    flat = ones if coefficients is None else coefficients.reshape(-1)
    counts = flat.new_zeros(2, 1, len(mine))
    counts[0, 0].index_add_(0, rows, flat)
    counts[1, 0].index_add_(0, rows, flat.square())
    return WeightInputs(mine.unsqueeze(0), None, counts, rows.numel(), out)


def embedding(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """A row of the table for each index."""
    yield _lookup(columns.t(), args["indices"])


def bag(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """A bag is one input: it holds each of its rows as often, and with the weight, that it says.

    Of a bag of maxima, each row counts as once looked up.
    """
    indices, offsets = args["indices"].reshape(-1), args["offsets"]
    if args.get("include_last_offset", False):
        offsets = offsets[:-1]
    position = torch.arange(len(indices), device=indices.device)
    bag = torch.searchsorted(offsets, position, right=True) - 1
    padding, given = args.get("padding_idx"), args.get("per_sample_weights")
    coefficients = (indices != (-1 if padding is None else padding)).float()
    mode = args.get("mode", 0)
    if mode == 1:
        size = coefficients.new_zeros(len(offsets)).index_add_(0, bag, coefficients)
        coefficients = coefficients / size[bag].clamp(min=1)
    elif given is not None:
        coefficients = coefficients * given.float()
    rows = len(columns)
    pairs, where = (bag * rows + indices).unique(return_inverse=True)
    merged = coefficients.new_zeros(len(pairs)).index_add_(0, where, coefficients)
    found = _lookup(columns.t(), pairs % rows, merged if mode != 2 else merged.clamp(max=1))
    yield found._replace(tokens=len(offsets))


def index(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """Rows of the one dimension that is indexed by a tensor."""
    found = [(place, index) for place, index in enumerate(args["indices"]) if index is not None]
    if len(found) != 1 or not isinstance(found[0][1], Tensor):
        raise UnsupportedUse("a lookup by several indices")
    place, index = found[0]
    if index.dtype in (torch.bool, torch.uint8):
        if index.ndim > 1:
            raise UnsupportedUse("a lookup by a mask of several dimensions")
        index = index.nonzero()
    yield _lookup(columns.movedim(place, -1).flatten(0, -2), index)


def index_select(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """Rows of one dimension."""
    yield _lookup(columns.movedim(args["dim"], -1).flatten(0, -2), args["index"])


def gather(args: Arguments, arg: str, columns: Tensor) -> Iterator[WeightInputs]:
    """Every element of a row has an index of its own; a row counts by their mean."""
    (found,) = index_select(args, arg, columns)
    assert found.counts is not None
    yield found._replace(counts=found.counts / found.out, tokens=found.tokens // found.out)
