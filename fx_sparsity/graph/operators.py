"""The operator table: which argument of which operator is a weight, and what its axes mean.

One row an operator, with what discovery, calibration and lowering need to know of it. Arguments are
bound by the name that the operator's schema gives them, never by position:
`F.embedding(indices, weight)` and `aten.embedding(weight, indices)` differ in order only.
A row names the operator without its namespace and overload, so that it serves ATen graphs, traced
`torch` functions and tensor methods alike.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx, nn

from fx_sparsity.graph import weight_inputs as inputs
from fx_sparsity.graph.weight_inputs import InputsOf
from fx_sparsity.graph.weight_map import WeightSite
from fx_sparsity.patterns import Role

Axes = Mapping[int | None, Role]
"""Axis of the argument, negative from the end -> its role.

None stands for the axes that are not named; without it they are `batch`.
"""
Arguments = Mapping[str, Any]
Finder = Callable[[Arguments], Iterable[tuple[str, Any, Axes]]]

ROW_OUTPUT: Axes = {0: "out", 1: "in"}
RIGHT_FACTOR: Axes = {-2: "in", -1: "out"}
LEFT_FACTOR: Axes = {-2: "out", -1: "in"}
LAST_REDUCED: Axes = {None: "out", -1: "in"}
TABLE: Axes = {0: "row", 1: "dim"}
BILINEAR: Axes = {0: "out", 1: "in", 2: "in"}
CONV: Axes = {0: "out", 1: "in", 2: "kernel", 3: "kernel", 4: "kernel"}
CONV_TRANSPOSED: Axes = {0: "in", 1: "out", 2: "kernel", 3: "kernel", 4: "kernel"}


class LinearForm(NamedTuple):
    """How an operator computes a linear layer: names of its arguments.

    Attributes:
        x, weight: of the activations and the weight.
        transposed: whether it takes the weight as [in, out].
    """

    x: str
    weight: str
    transposed: bool


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        kind: what the weight is called in a `WeightMap`.
        find: bound arguments -> (argument name, its value, its axes) of every possible weight.
        inputs: what calibration needs: the inputs of the weight at a call. None for recurrent
            operators, fused attention and chains, whose inner activations no argument shows.
        linear: what lowering needs: which arguments make up a linear layer; None for the others.
        bias: name of the argument that is added to the product.
    """

    kind: str
    find: Finder
    inputs: InputsOf | None = None
    linear: LinearForm | None = None
    bias: str = "bias"


def _at(**axes: Axes) -> Finder:
    """Weights are the arguments of these names."""
    return lambda args: [(name, args[name], a) for name, a in axes.items() if name in args]


def _product(left: str, right: str) -> tuple[Finder, InputsOf]:
    """Either factor of a matrix product may be the weight."""
    find = _at(**{right: RIGHT_FACTOR, left: LEFT_FACTOR})
    return find, inputs.either(**{right: inputs.right(left), left: inputs.left(right)})


def _convolution(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    yield "weight", args["weight"], CONV_TRANSPOSED if args["transposed"] else CONV


def _recurrent(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    for i, weight in enumerate(args["params"]):
        yield f"params[{i}]", weight, ROW_OUTPUT


def _einsum(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    """A letter that the result lacks is reduced; one that only this operand has is an output."""
    inputs, arrow, result = args["equation"].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:  # the result has the letters that occur once
        result = "".join(c for c in inputs if inputs.count(c) == 1)
    for i, (term, operand) in enumerate(zip(terms, args["tensors"], strict=False)):
        others = "".join(terms[:i] + terms[i + 1 :])
        leading, ellipsis, trailing = term.partition("...")
        places = list(enumerate(leading)) + [
            (place - len(trailing) if ellipsis else place + len(leading), c)
            for place, c in enumerate(trailing)
        ]
        axes: dict[int | None, Role] = {
            axis: "in" if c not in result else "batch" if c in others else "out"
            for axis, c in places
        }
        yield f"tensors[{i}]", operand, axes


def _index(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    """Axes with an index tensor are looked up; the others make up what is found."""
    indices = list(args["indices"])
    end = len(indices) - indices.index(...) if ... in indices else 0
    axes: dict[int | None, Role] = {None: "dim"}
    for place, index in enumerate(indices):
        if isinstance(index, fx.Node):
            axes[place if place < len(indices) - end else place - len(indices)] = "row"
    yield "self", args["self"], axes


def _gather(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    yield "self", args["self"], {None: "dim", args["dim"]: "row"}


def _tensordot(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    """Axes that both operands list are reduced; the others are outputs."""
    if "dims" in args:  # torch.tensordot(a, b, dims): their number, or both lists
        dims = args["dims"]
        both = (range(-dims, 0), range(dims)) if isinstance(dims, int) else dims
        sides = zip(("a", "b"), both, strict=True)
    else:
        sides = zip(("self", "other"), (args["dims_self"], args["dims_other"]), strict=True)
    for name, reduced in sides:
        axes: dict[int | None, Role] = {None: "out", **dict.fromkeys(reduced, "in")}
        yield name, args[name], axes


def _chain(args: Arguments) -> Iterable[tuple[str, Any, Axes]]:
    """The ends of a chain of products; which axis is reduced in between, its ends decide."""
    tensors = args["tensors"]
    yield f"tensors[{len(tensors) - 1}]", tensors[-1], RIGHT_FACTOR
    yield "tensors[0]", tensors[0], LEFT_FACTOR


OPERATORS: dict[str, Operator] = {
    "linear": Operator(
        "linear",
        _at(weight=ROW_OUTPUT, input=LEFT_FACTOR),
        inputs.linear,
        LinearForm("input", "weight", False),
    ),
    "addmm": Operator(
        "linear", *_product("mat1", "mat2"), LinearForm("mat1", "mat2", True), bias="self"
    ),
    "mm": Operator("matmul", *_product("self", "mat2"), LinearForm("self", "mat2", True)),
    "matmul": Operator("matmul", *_product("self", "other"), LinearForm("self", "other", True)),
    "mv": Operator("matmul", _at(self=LEFT_FACTOR), inputs.left("vec")),
    "bmm": Operator("matmul", *_product("self", "mat2")),
    "baddbmm": Operator("matmul", *_product("batch1", "batch2"), bias="self"),
    "addbmm": Operator(
        "matmul",
        _at(batch2={0: "in", 1: "in", 2: "out"}, batch1={0: "in", 1: "out", 2: "in"}),
        inputs.summed,
        bias="self",
    ),
    "inner": Operator("matmul", _at(other=LAST_REDUCED, self=LAST_REDUCED), inputs.inner),
    "tensordot": Operator("matmul", _tensordot),
    "linalg_multi_dot": Operator("matmul", _chain),
    "bilinear": Operator("bilinear", _at(weight=BILINEAR), inputs.bilinear),
    "_trilinear": Operator("bilinear", _at(i2=BILINEAR), inputs.trilinear),
    "grouped_mm": Operator("experts", _at(mat_b=RIGHT_FACTOR), inputs.grouped("mat_a", "offs")),
    "_grouped_mm": Operator("experts", _at(mat2=RIGHT_FACTOR), inputs.grouped("self", "offs")),
    "grouped_mm_fallback": Operator(
        "experts", _at(weight=RIGHT_FACTOR), inputs.grouped("input", "offs")
    ),
    "einsum": Operator("einsum", _einsum, inputs.einsum),
    "embedding": Operator("embedding", _at(weight=TABLE), inputs.embedding),
    "embedding_bag": Operator("embedding_bag", _at(weight=TABLE), inputs.bag),
    "_embedding_bag": Operator("embedding_bag", _at(weight=TABLE), inputs.bag),
    "_embedding_bag_forward_only": Operator("embedding_bag", _at(weight=TABLE), inputs.bag),
    "index": Operator("lookup", _index, inputs.index),
    "getitem": Operator("lookup", _index),
    "index_select": Operator("lookup", _gather, inputs.index_select),
    "gather": Operator("lookup", _gather, inputs.gather),
    "conv1d": Operator("conv", _at(weight=CONV), inputs.convolution_of(transposed=False)),
    "conv2d": Operator("conv", _at(weight=CONV), inputs.convolution_of(transposed=False)),
    "conv3d": Operator("conv", _at(weight=CONV), inputs.convolution_of(transposed=False)),
    "conv_transpose1d": Operator(
        "conv_transpose", _at(weight=CONV_TRANSPOSED), inputs.convolution_of(transposed=True)
    ),
    "conv_transpose2d": Operator(
        "conv_transpose", _at(weight=CONV_TRANSPOSED), inputs.convolution_of(transposed=True)
    ),
    "conv_transpose3d": Operator(
        "conv_transpose", _at(weight=CONV_TRANSPOSED), inputs.convolution_of(transposed=True)
    ),
    "convolution": Operator("conv", _convolution, inputs.convolution),
    "lstm": Operator("recurrent", _recurrent),
    "gru": Operator("recurrent", _recurrent),
    "rnn_tanh": Operator("recurrent", _recurrent),
    "rnn_relu": Operator("recurrent", _recurrent),
    "lstm_cell": Operator("recurrent", _at(w_ih=ROW_OUTPUT, w_hh=ROW_OUTPUT)),
    "gru_cell": Operator("recurrent", _at(w_ih=ROW_OUTPUT, w_hh=ROW_OUTPUT)),
    "rnn_tanh_cell": Operator("recurrent", _at(w_ih=ROW_OUTPUT, w_hh=ROW_OUTPUT)),
    "rnn_relu_cell": Operator("recurrent", _at(w_ih=ROW_OUTPUT, w_hh=ROW_OUTPUT)),
    "multi_head_attention_forward": Operator(
        "attention",
        _at(
            in_proj_weight=ROW_OUTPUT,
            q_proj_weight=ROW_OUTPUT,
            k_proj_weight=ROW_OUTPUT,
            v_proj_weight=ROW_OUTPUT,
            out_proj_weight=ROW_OUTPUT,
        ),
    ),
    "_native_multi_head_attention": Operator(
        "attention", _at(qkv_weight=ROW_OUTPUT, proj_weight=ROW_OUTPUT)
    ),
    "_transformer_encoder_layer_fwd": Operator(
        "attention",
        _at(
            qkv_weight=ROW_OUTPUT,
            proj_weight=ROW_OUTPUT,
            ffn_weight_1=ROW_OUTPUT,
            ffn_weight_2=ROW_OUTPUT,
        ),
    ),
}

MODULES: dict[type[nn.Module], tuple[str, Axes]] = {
    nn.Linear: ("linear", ROW_OUTPUT),
    nn.Bilinear: ("bilinear", BILINEAR),
    nn.Embedding: ("embedding", TABLE),
    nn.EmbeddingBag: ("embedding_bag", TABLE),
    nn.modules.conv._ConvTransposeNd: ("conv_transpose", CONV_TRANSPOSED),
    nn.modules.conv._ConvNd: ("conv", CONV),
    nn.RNNBase: ("recurrent", ROW_OUTPUT),
    nn.RNNCellBase: ("recurrent", ROW_OUTPUT),
    nn.MultiheadAttention: ("attention", ROW_OUTPUT),
}
"""Kind and axes of the weights of modules that a graph calls as a whole; the first class that fits
counts. Each of them calls its weights `weight`, `weight_...` or `..._weight`.
"""

RENORMALIZATIONS = frozenset({"embedding_renorm_", "embedding_renorm"})
"""Operators that shorten the rows of a table that are too long, in place: it stays what it was."""
COPIES = frozenset({"copy_", "copy", "setitem"})
"""Operators that write their last argument into the first."""
SCATTERS = frozenset({"slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"})
"""Operators that return their first argument with the second in a part of it: that which the view
of the same name shows, without `_scatter`.
"""
ADDITIONS = COPIES | SCATTERS | {"add", "add_", "sub", "sub_", "rsub", "cat", "stack", "where"}
"""Consumers that only add a parameter to something, or put it beside something."""
EMPTY = frozenset(
    f"{start}{fill}{end}"
    for fill in ("empty", "zeros", "ones", "full")
    for start, end in (("new_", ""), ("", "_like"))
)
"""Operators that take nothing but shape and dtype from their first argument."""
SCALINGS = frozenset({"mul", "mul_", "div", "div_", "neg"})
"""Elementwise operators that are linear in their first argument, and products in both."""
DIFFERENCES = frozenset({"sub", "sub_", "rsub"})
POWERS = frozenset({"pow", "square", "abs"})
"""What makes a difference a distance, when it is summed."""
REDUCTIONS = frozenset({"sum", "mean", "nansum", "nanmean"})
"""Operators that reduce the axes `dim`, all of them by default."""
NORMALIZATIONS = frozenset(
    {"layer_norm", "native_layer_norm", "rms_norm", "group_norm", "native_group_norm"}
)
"""Consumers that scale by a parameter, and that torch does not tag as elementwise."""
UNTAGGED = frozenset(
    {
        *("where", "rsub", "masked_fill", "masked_fill_", "tril", "triu"),
        *("_weight_norm", "_weight_norm_interface"),
    }
)
"""Elementwise operators with overloads that torch does not tag as such; a weight norm is one to
its second argument.
"""
COMBINATIONS = frozenset({"cat", "stack"})
"""Operators that put tensors beside one another; the axes stay what they were."""
REARRANGEMENTS = frozenset(
    {
        *("flip", "fliplr", "flipud", "roll", "pad", "constant_pad_nd"),
        *("repeat", "tile", "repeat_interleave"),
    }
)
"""Operators that move, repeat or lengthen whole slices; the axes stay what they were."""
MIXTURES = frozenset(
    {
        *("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "instance_norm"),
        *("_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional"),
        *("_batch_norm_with_update", "cudnn_batch_norm", "_batch_norm_no_update"),
        *("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm"),
        *("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum"),
    }
)
"""Operators whose result has the axes of the first argument, though each element depends on
several: what standardizes a weight, for one.
"""
SELECTIONS = frozenset({"where", "masked_fill", "masked_fill_", "_weight_norm", "tril", "triu"})
"""Elementwise operators that pass elements on as they are, or scaled, or others in their place."""
PRODUCTS = frozenset({"mm", "matmul", "bmm", "linear", "addmm", "baddbmm"})
"""Operators of two matrices, whose product has the last axis but one of the left, and one axis of
the right.
"""
BATCH = "_add_batch_dim"
"""With what `torch.vmap` takes an axis away from its function."""
SAME_VALUES = frozenset(
    {
        *("alias", "clone", "contiguous", "detach", "detach_", "requires_grad_"),
        *("lift_fresh", "lift_fresh_copy"),
        *("to", "_to_copy", "float", "half", "bfloat16", "double", "type_as"),
        *("dequantize_per_tensor", "dequantize_per_channel", "dequantize_affine"),
        *("quantize_per_tensor", "quantize_per_channel", "quantize_affine"),
        *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"),
        *(
            "fake_quantize_per_tensor_affine_cachemask",
            "fake_quantize_per_channel_affine_cachemask",
        ),
        *("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",),
        *("_weight_norm", "_weight_norm_interface", "dropout"),
        *RENORMALIZATIONS,
    }
)
"""Operators whose result stands for their first argument, element by element.

Elementwise arithmetic is not listed: torch tags it (see `is_elementwise`).
"""


SCORING = frozenset({"flex_attention", "flex_attention_backward"})
"""Higher-order operators that call a subgraph with values of their own, and what it captures: what
becomes of that is not known."""


def shows_inputs(op: str) -> bool:
    """Whether a call of an operator shows the inputs of its weights."""
    return op in OPERATORS and OPERATORS[op].inputs is not None


def groups_of(op: str, args: Arguments) -> tuple[Role, int]:
    """(role of the axis that a convolution splits, into how many groups); 1 for all others."""
    transposed = OPERATORS[op].kind == "conv_transpose" or args.get("transposed", False)
    convolves = OPERATORS[op].kind in ("conv", "conv_transpose")
    return "in" if transposed else "out", args.get("groups", 1) if convolves else 1


def groups_of_owner(model: nn.Module, site: WeightSite) -> tuple[Role, int]:
    """What `groups_of` tells of a call, by the module that owns a weight."""
    owner = model.get_submodule(site.owner)
    groups = owner.groups if isinstance(owner, nn.modules.conv._ConvNd) else 1
    return "in" if isinstance(owner, nn.modules.conv._ConvTransposeNd) else "out", groups
