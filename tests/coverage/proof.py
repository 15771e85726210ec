"""Proves by execution what a `WeightMap` claims of every weight, on the exported graph.

For each use of each weight: one index of the *parameter* is zeroed, the constant part of the graph
between it and the consuming node is recomputed, and that node alone is run again on random
activations. What must happen follows from the role, and is written down here for each operator,
independently of the library's table.
"""

from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fx_sparsity.graph.calls import bind
from fx_sparsity.graph.operators import OPERATORS
from fx_sparsity.graph.uses import canonical_fqn

# (operator, argument) -> (argument that holds the activation, its reduced axis, axis of the result)
FACTORS = {
    ("linear", "weight"): ("input", -1, -1),
    ("linear", "input"): ("weight", -1, -2),
    ("addmm", "mat2"): ("mat1", -1, -1),
    ("addmm", "mat1"): ("mat2", -2, -2),
    ("mm", "mat2"): ("self", -1, -1),
    ("mm", "self"): ("mat2", -2, -2),
    ("matmul", "other"): ("self", -1, -1),
    ("matmul", "self"): ("other", -2, -2),
    ("mv", "self"): ("vec", -1, -1),
    ("bmm", "mat2"): ("self", -1, -1),
    ("bmm", "self"): ("mat2", -2, -2),
    ("baddbmm", "batch2"): ("batch1", -1, -1),
    ("baddbmm", "batch1"): ("batch2", -2, -2),
    ("grouped_mm", "mat_b"): ("mat_a", -1, -1),
    ("_grouped_mm", "mat2"): ("self", -1, -1),
    ("grouped_mm_fallback", "weight"): ("input", -1, -1),
    **{(f"conv{d}d", "weight"): ("input", 1, 1) for d in (1, 2, 3)},
    **{(f"conv_transpose{d}d", "weight"): ("input", 1, 1) for d in (1, 2, 3)},
    ("convolution", "weight"): ("input", 1, 1),
}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
BAGS = {"embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"}
# operator -> names of its packed projection, that one's bias, its output projection, that one's bias
ATTENTION = {
    "multi_head_attention_forward": (
        *("in_proj_weight", "in_proj_bias"),
        *("out_proj_weight", "out_proj_bias"),
    ),
    "_native_multi_head_attention": ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias"),
    "_transformer_encoder_layer_fwd": ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias"),
}
# operator -> the equation that it computes, and the names of its operands
EQUATIONS = {
    "addbmm": ("bnm,bmp->np", ("batch1", "batch2")),
    "tensordot": ("ni,io->no", ("self", "other")),
    "inner": ("ni,oi->no", ("self", "other")),
    "linalg_multi_dot": ("ni,io->no", ("tensors",)),
}
LOOKUPS = {"embedding", "index", "getitem", "index_select", "gather", *BAGS}


class Wrong(AssertionError):
    """A claim that execution refutes."""


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node computes."""

    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)
        self.values = {}

    def run_node(self, n):
        self.values[n] = super().run_node(n)
        return self.values[n]


class Proof:
    """Checks the claims of a map on one graph.

    Args:
        gm: its parameters are overwritten by random numbers without zeros.
        args, kwargs: inputs that it was captured with.
    """

    def __init__(self, gm, args, kwargs=None):
        self.gm = gm
        self.generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.gm.parameters():
                if parameter.is_floating_point():
                    noise = torch.rand(parameter.shape, generator=self.generator)
                    parameter.copy_(0.02 + 0.05 * noise)
            recorder = Recorder(self.gm)
            recorder.run(*pytree.tree_leaves((args, kwargs or {})))
        self.values = recorder.values
        self.nodes = {node.name: node for node in self.gm.graph.nodes}
        self.interpreter = recorder
        named = self.gm.named_parameters(remove_duplicate=False)
        self.named = {canonical_fqn(name): parameter for name, parameter in named}
        self.parameters = {
            node: self.values[node] for node in self.gm.graph.nodes if node.op == "get_attr"
        }

    @torch.no_grad()
    def check(self, site):
        """Raise `Wrong` for the first claim about a weight that does not hold."""
        parameter = self.named[site.fqn]
        for use in site.uses:
            node = self.nodes[use.node]
            (value,) = [v for a, v, _ in OPERATORS[use.op].find(bind(node)) if a == use.arg]
            for dim, role in enumerate(use.roles):
                if role == "kernel" or parameter.shape[dim] == 1:
                    continue
                self.check_axis(site.fqn, parameter, use, node, value, dim, role)

    def check_axis(self, fqn, parameter, use, node, value, dim, role):
        weight = self.values[value]
        size = parameter.shape[dim]
        indices = {0, size // 2, size - 1}
        if use.slice is not None and use.slice[0] == dim:
            indices |= {use.slice[1], use.slice[2] - 1}
        claim = f"{fqn} dim {dim} as {role} of {use.op}({use.arg}) at {node.name}"
        touched = False
        if (use.op, use.arg) in FACTORS:  # what lies beside the parameter, is taken away
            part = self.zeroed(value, parameter) != weight
            weight = weight.masked_fill(~part, 0)
        for index in sorted(indices):
            edited = self.zeroed(value, parameter, dim, index)
            hit = (edited == 0) & (weight != 0)
            if not hit.any():
                hit = (edited != weight) & (weight != 0)  # something is added on the way
            if hit.any():
                touched = True
                self.check_index(claim, use, node, value, weight, hit, role)
        if not touched:
            raise Wrong(f"{claim}: no index reaches the node")

    def zeroed(self, value, parameter, dim=None, index=0):
        """What `value` holds once one index of a parameter is zeroed, or all of it is."""
        edited = parameter.clone()
        (edited if dim is None else edited.select(dim, index)).zero_()
        memo = {n: edited for n, t in self.parameters.items() if t is parameter}

        def compute(node):
            if node in memo:
                return memo[node]
            arguments = node.all_input_nodes
            results = {argument: compute(argument) for argument in arguments}
            same = all(results[a] is self.values[a] for a in arguments)
            memo[node] = self.values[node] if same else self.run(node, results)
            return memo[node]

        return compute(value)

    def run(self, node, results):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: results[n])
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def check_index(self, claim, use, node, value, weight, hit, role):
        """Judge one node, whose weight loses the elements `hit`."""
        inputs = {}
        for n in node.all_input_nodes:
            v = weight if n is value else self.values[n]
            real = n is not value and isinstance(v, Tensor) and v.is_floating_point()
            # Positive and small, so that units behind a ReLU are active and gates unsaturated.
            inputs[n] = (
                0.1 * torch.rand(v.shape, generator=self.generator).to(v.dtype) if real else v
            )
        case = Case(self, use, node, value, inputs, weight, hit, claim)
        if use.op in EQUATIONS:
            case.as_einsum(*EQUATIONS[use.op])
            case.einsum(role)
        elif use.op in RECURRENT:
            case.recurrent(role)
        elif use.op == "einsum":
            case.einsum(role)
        elif use.op.endswith("_cell"):
            case.cell(role)
        elif use.op in ("bilinear", "_trilinear"):
            case.bilinear(role)
        elif use.op in ATTENTION:
            case.attention(role)
        elif use.op in LOOKUPS:
            case.lookup(role)
        else:
            case.factor(role)


class Case:
    """One node, its inputs, and the elements of its weight that are zeroed."""

    def __init__(self, proof, use, node, value, inputs, weight, hit, claim):
        self.proof, self.use, self.node, self.value = proof, use, node, value
        self.inputs, self.weight, self.hit, self.claim = inputs, weight, hit, claim
        self.args = bind(node)

    def result(self, weight=None, replaced=None):
        """The node's result for another weight, and another value of one input node."""
        inputs = {**self.inputs, **(replaced or {})}
        if weight is not None:
            inputs[self.value] = weight
        result = self.proof.run(self.node, inputs)
        return result[0] if isinstance(result, tuple) else result

    def as_einsum(self, equation, names):
        """Judge the operator by an equation that it stands for."""
        operands = [self.args[name] for name in names]
        tensors = operands[0] if len(operands) == 1 else operands
        self.args = {"equation": equation, "tensors": tensors}
        self.use = replace(self.use, arg=f"tensors[{tensors.index(self.value)}]")

    def pruned(self):
        return self.result(self.weight.masked_fill(self.hit, 0))

    def require(self, condition, what):
        if not condition:
            raise Wrong(f"{self.claim}: {what}")

    def slab(self, axis):
        """Which indices of one axis are zeroed; everything else of them must be zero, too."""
        axis %= self.weight.ndim
        others = [a for a in range(self.weight.ndim) if a != axis]
        indices = self.hit.amax(others) if others else self.hit
        shape = [-1 if a == axis else 1 for a in range(self.weight.ndim)]
        whole = indices.view(shape) & (self.weight != 0)
        self.require(torch.equal(whole, self.hit), f"is not a slab along axis {axis}")
        return indices

    def same(self, a, b, what):
        self.require(torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True), what)

    def confined(self, axis, indices):
        """The result changes at these indices of an axis, and nowhere else."""
        before, after = self.result().movedim(axis, 0), self.pruned().movedim(axis, 0)
        self.same(before[~indices], after[~indices], "other outputs change")
        self.require(not torch.allclose(before[indices], after[indices]), "its output stays")

    def factor(self, role):
        """A product of a weight and an activation."""
        other, reduced, kept = FACTORS[self.use.op, self.use.arg]
        activation = self.inputs[self.args[other]]
        transposed = self.use.op.startswith("conv_transpose") or self.args.get("transposed")
        convolves = self.use.op.startswith("conv")
        axes = {"out": -1, "in": -2}
        if kept == -2 or self.use.op in ("linear", "mv"):
            axes = {"out": -2, "in": -1}
        if convolves:
            axes = {"out": 1, "in": 0} if transposed else {"out": 0, "in": 1}
        groups = activation.shape[1] // self.weight.shape[axes["in"]] if convolves else 1
        if self.use.op in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback"):
            axes |= {"batch": 0}
        if role == "batch":
            self.batch(axes)
        elif role == "out":
            indices = self.slab(axes["out"])
            groups = self.args.get("groups", 1) if transposed else 1
            self.confined(1 if convolves else kept, indices.repeat(groups))
        else:
            indices = self.slab(axes["in"])
            if activation.ndim == 1:
                reduced = -1
            indices = indices.repeat(1 if transposed else groups)
            shape = [1] * activation.ndim
            shape[reduced] = -1
            silenced = activation.masked_fill(indices.view(shape), 0)
            expected = self.result(replaced={self.args[other]: silenced})
            self.same(self.pruned(), expected, "is not what zeroing the input channel does")
            self.require(not torch.equal(expected, self.result()), "its input has no effect")

    def batch(self, axes):
        """A slice of a stack: results of the other slices stay as they are."""
        if bool(self.hit.all()):
            return  # the only slice that this node receives
        indices = self.slab(0)
        before, after = self.result(), self.pruned()
        if "batch" not in axes:
            self.require(torch.equal(before[~indices], after[~indices]), "other slices change")
            return
        ends = self.inputs[self.args["offs"]].tolist()
        for slice_, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if not indices[slice_]:
                self.same(before[start:end], after[start:end], "other experts change")

    def bilinear(self, role):
        """A product of a weight and two activations, each with its own reduced axis."""
        if role == "out":
            self.confined(-1, self.slab(0))
            return
        (axis,) = [a for a in (1, 2) if self.varies(a)]
        names = {"bilinear": ("input1", "input2"), "_trilinear": ("i1", "i3")}
        operand = self.args[names[self.use.op][axis - 1]]
        silenced = self.inputs[operand].masked_fill(self.slab(axis), 0)
        expected = self.result(replaced={operand: silenced})
        self.same(self.pruned(), expected, "is not what zeroing the input channel does")

    def einsum(self, role):
        inputs, _, result = self.args["equation"].replace(" ", "").partition("->")
        terms = inputs.split(",")
        place = int(self.use.arg.removeprefix("tensors[").removesuffix("]"))
        term = terms[place]
        axes = [a for a in range(self.weight.ndim) if self.varies(a)]
        self.require(len(axes) == 1, f"is spread over axes {axes}")
        letter, indices = term[axes[0] - len(term)], self.slab(axes[0])
        if role in ("out", "batch"):
            self.require(letter in result, f"letter {letter} is reduced")
            self.confined(result.index(letter) - len(result), indices)
        else:
            self.require(letter not in result, f"letter {letter} is kept")
            replaced = {}
            for other, operand in zip(terms, self.args["tensors"], strict=True):
                if operand is not self.value and letter in other:
                    activation = self.inputs[operand]
                    shape = [1] * activation.ndim
                    shape[other.index(letter) - len(other)] = -1
                    replaced[operand] = activation.masked_fill(indices.view(shape), 0)
            expected = self.result(replaced=replaced)
            self.same(self.pruned(), expected, "is not what zeroing the input channel does")

    def varies(self, axis):
        first = self.hit.select(axis, 0).unsqueeze(axis)
        return not torch.equal(first.expand_as(self.hit), self.hit)

    def lookup(self, role):
        """Results hold looked-up rows: a zeroed row is zero wherever its index stands."""
        before, after = self.result(), self.pruned()
        if self.use.op in BAGS:
            self.bag(role, before, after)
            return
        dim, index = self.index()
        if self.use.op == "gather":
            hits = torch.gather(self.hit, dim, index)
        else:
            kept = [a for a in range(self.hit.ndim) if a != dim]
            if role == "row":
                rows = self.slab(dim)
                hits = rows[index]
                shape = [1] * dim + list(index.shape) + [1] * (len(kept) - dim)
            else:
                (axis,) = [a for a in kept if self.varies(a)]
                place = axis if axis < dim else axis + index.ndim - 1
                hits, shape = self.slab(axis), [1] * before.ndim
                shape[place] = -1
            hits = hits.view(shape).expand_as(before)
        self.require(torch.equal(after, before.masked_fill(hits, 0)), "other results change")

    def index(self):
        if self.use.op == "embedding":
            return 0, self.inputs[self.args["indices"]]
        if self.use.op in ("index", "getitem"):
            indices = self.args["indices"]
            ((dim, node),) = [(d, i) for d, i in enumerate(indices) if isinstance(i, fx.Node)]
            return dim, self.inputs[node]
        return self.args["dim"], self.inputs[self.args["index"]]

    def bag(self, role, before, after):
        if role == "dim":
            self.require(
                torch.equal(after, before.masked_fill(self.slab(1), 0)), "other columns change"
            )
            return
        rows, index = self.slab(0), self.inputs[self.args["indices"]]
        offsets = self.inputs[self.args["offsets"]].tolist()
        bags = zip(offsets, [*offsets[1:], len(index)], strict=False)
        for bag, (start, end) in enumerate(bags):
            unchanged = torch.equal(before[bag], after[bag])
            self.require(unchanged != bool(rows[index[start:end]].any()), f"bag {bag} is wrong")

    def cell(self, role):
        """One step of a recurrent network: a row of gates moves one unit of the new state."""
        state = self.args["hx"][0] if isinstance(self.args["hx"], list) else self.args["hx"]
        before, after = self.result(), self.pruned()
        self.require(not torch.equal(before, after), "the state does not change")
        if role == "out":
            self.units(self.slab(0), before, after)
            return
        node = self.args["input"] if self.use.arg == "w_ih" else state
        silenced = {node: self.inputs[node].masked_fill(self.slab(1), 0)}
        pruned = self.result(self.weight.masked_fill(self.hit, 0), silenced)
        self.require(
            torch.equal(self.result(replaced=silenced), pruned),
            "it matters although its input channel is zero",
        )

    def units(self, rows, before, after):
        """Gates are stacked: rows belong to units in turn."""
        touched = torch.zeros(before.shape[-1], dtype=torch.bool)
        touched[rows.nonzero().flatten() % before.shape[-1]] = True
        self.require(torch.equal(before[..., ~touched], after[..., ~touched]), "other units change")

    def recurrent(self, role):
        """One step, from a random state: a row of gates moves one unit of its layer's new state."""
        layer = self.args["params"].index(self.value) // (4 if self.args["has_biases"] else 2)
        recurs = self.args["params"].index(self.value) % (4 if self.args["has_biases"] else 2) == 1
        sequence = self.args["input"]
        time = 1 if self.args["batch_first"] else 0
        states = self.args["hx"] if isinstance(self.args["hx"], list | tuple) else [self.args["hx"]]
        step = {sequence: self.inputs[sequence].narrow(time, 0, 1)}
        step |= {
            s: 0.1 * torch.rand(self.inputs[s].shape, generator=self.proof.generator)
            for s in states
        }

        def state(weight, replaced):
            inputs = {**self.inputs, **step, self.value: weight, **replaced}
            return self.proof.run(self.node, inputs)[1][layer]

        pruned = self.weight.masked_fill(self.hit, 0)
        before, after = state(self.weight, {}), state(pruned, {})
        self.require(not torch.equal(before, after), "the state does not change")
        if role == "out":
            self.units(self.slab(0), before, after)
            return
        first = layer < (2 if self.args["bidirectional"] else 1)
        self.require(first or recurs, "only the first layer's input can be silenced")
        node = states[0] if recurs else sequence
        silenced = step[node].clone()
        (silenced[layer] if recurs else silenced).masked_fill_(self.slab(1), 0)
        args = ({node: silenced},)
        self.require(
            torch.equal(state(self.weight, *args), state(pruned, *args)),
            "it matters although its input channel is zero",
        )

    def attention(self, role):
        """A fused attention, or a whole layer that normalises first, where each axis shows by itself.

        Without biases, zeroing a channel of q is what zeroing it of k is, for scores are sums over
        channels; zeroing one of v is what zeroing an input of the output projection is; and zeroing
        a unit of a feed-forward network is the same on either side of it. What must not hide an
        output is an identity, or zero; and all else is at unit scale, so that effects are large.
        """
        packed, packed_bias, out, out_bias = ATTENTION[self.use.op]
        self.weight = torch.randn(self.weight.shape, generator=self.proof.generator)
        for node, value in self.inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                self.inputs[node] = torch.randn(value.shape, generator=self.proof.generator)
        self.inputs[self.value] = self.weight
        norms = ("norm_bias_1", "norm_bias_2")  # a large one could silence a hidden unit
        for bias in (packed_bias, out_bias, "ffn_bias_1", "ffn_bias_2", *norms):
            self.set(bias, 0)
        (index,) = self.slab(0 if role == "out" else 1).nonzero().flatten().tolist()
        before, pruned, arg = self.result(), self.pruned(), self.use.arg
        self.require(not torch.allclose(before, pruned, rtol=0.1), "it has no effect")
        if role == "in":
            self.same(pruned, self.result(**self.without_input(arg, index)), "is no input channel")
        elif arg in (out, "ffn_weight_2"):
            self.set("ffn_weight_2", 0, unless=arg)
            self.confined(-1, self.slab(0))
        elif arg == "ffn_weight_1":
            same = self.zeroed_in("ffn_weight_2", 1, index)
            self.same(pruned, self.result(replaced=same), "is no hidden unit")
        else:
            self.projection(packed, out, index)

    def projection(self, packed, out, row):
        """A row of the projection to q, k or v."""
        eye = torch.eye(len(self.inputs[self.args[out]]))
        self.inputs[self.args[out]] = eye
        self.set("ffn_weight_2", 0)
        width = len(eye)
        part = "qkv".index(self.use.arg[0]) if self.use.arg != packed else row // width
        channel = row % width
        heads = self.args["num_heads" if "num_heads" in self.args else "num_head"]
        touched = torch.zeros(width, dtype=torch.bool)
        if part == 2:
            touched[channel] = True
        else:
            touched.view(heads, -1)[channel // (width // heads)] = True
            partner = 1 - part
            if self.use.arg == packed:
                same = self.zeroed_in(packed, 0, partner * width + channel)
            else:
                same = self.zeroed_in(f"{'qk'[partner]}_proj_weight", 0, channel)
            self.same(self.pruned(), self.result(replaced=same), "is not that channel of q and k")
        self.confined(-1, touched)

    def without_input(self, arg, index):
        """What takes one input channel of a projection of an attention or its layer away."""
        packed, _, out, _ = ATTENTION[self.use.op]
        if arg == "ffn_weight_2":
            return {"replaced": self.zeroed_in("ffn_weight_1", 0, index)}
        if arg == out:
            separate = self.args.get("v_proj_weight") is not None
            name, row = ("v_proj_weight", 0) if separate else (packed, 2 * len(self.weight))
            return {"replaced": self.zeroed_in(name, 0, row + index)}
        if "norm_weight_1" in self.args:  # the residual goes past the norm
            norm = "2" if arg == "ffn_weight_1" else "1"
            names = (f"norm_weight_{norm}", f"norm_bias_{norm}")
        else:
            names = ("query", "key", "value")
            if arg != packed:
                names = (names["qkv".index(arg[0])],)
        return {"replaced": dict(x for n in names for x in self.zeroed_in(n, -1, index).items())}

    def zeroed_in(self, name, dim, index):
        """One index of an argument, zeroed: a replacement for its node."""
        value = self.inputs[self.args[name]].clone()
        value.select(dim, index).zero_()
        return {self.args[name]: value}

    def set(self, name, value, unless=""):
        """Fill an argument, where the operator has it."""
        if name != unless and isinstance(node := self.args.get(name), fx.Node):
            self.inputs[node] = torch.full_like(self.inputs[node], value)
