"""Lookups in tables that a graph holds itself: floats, or codes behind a dequantization."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fx_sparsity.graph.calls import bind, operator_name
from fx_sparsity.graph.operators import OPERATORS
from fx_sparsity.graph.sources import Source
from fx_sparsity.kernels.embedding_ops import MODES, RESULTS
from fx_sparsity.lowering.dense_tables import DenseTable, read_table
from fx_sparsity.lowering.places import GraphPlace
from fx_sparsity.quantization.codes import Codes, hold_codes
from fx_sparsity.verification.graph_reader import read_value
from fx_sparsity.verification.stored import StoredWeight

_BAG = "embedding_bag"
_KINDS = ("embedding", _BAG)


def is_lookup(node: fx.Node) -> bool:
    """Whether a node is an embedding or a bag."""
    return OPERATORS[operator_name(node)].kind in _KINDS


def indices_of(args: Mapping[str, Any]) -> str:
    """The argument that has the indices, which torch's functions call `input`."""
    return "indices" if "indices" in args else "input"


def held_by(source: Source, value: fx.Node) -> tuple[str, Tensor] | None:
    """Name and tensor of the weight that an argument is made of; None where no model holds it."""
    while (held := source(value)) is None and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return held


@dataclass(eq=False)
class TableNode(GraphPlace):
    """A node that looks up in a table."""

    @classmethod
    def of(cls, names: tuple[str, ...], value: fx.Node, source: Source, **attributes: Any) -> Self:
        """A place whose table is held by what a node reads.

        Args:
            names: of the weight.
            value: the node's argument.
            source: see `GraphPlace`.
            attributes: the others of the place.
        """
        held = held_by(source, value)
        tensor = attributes["seen"] if held is None else held[1]
        bag = OPERATORS[operator_name(attributes["node"])].kind == _BAG
        owner = nn.EmbeddingBag if bag else nn.Embedding
        return cls(names, owner, tensor, source=source, **attributes)

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `GraphPlace`."""
        of_bags = ("offsets", "per_sample_weights") if self.owner is nn.EmbeddingBag else ()
        return (indices_of(bind(self.node)), *of_bags)

    @property
    def weight(self) -> fx.Node:
        """See `GraphPlace`."""
        node: fx.Node = bind(self.node)["weight"]
        return node

    @property
    def result(self) -> fx.Node | None:
        """See `GraphPlace`: ATen's bags give a tuple, whose first element counts."""
        if self.owner is nn.Embedding or self.node.target is functional.embedding_bag:
            return self.node
        read = [user for user in self.node.users if user.users]
        first = [u for u in read if u.target is operator.getitem and u.args[1] == 0]
        return first[0] if len(first) == len(read) == 1 else None

    def look(self) -> DenseTable | str:
        """See `Place`."""
        args, result = bind(self.node), self.result
        if result is None:
            return "more of its results is read than the bags"
        if args.get("max_norm") is not None:
            return "its rows are rescaled at each call"
        stored = read_value(self.source, self.seen, self.weight)
        if stored.obstacle:
            return stored.obstacle
        if stored.data.ndim != 2 or not self.seen.is_whole:
            return "it looks up in a part of its weight, or in what was made of it"
        if not stored.quantized and not stored.data.is_floating_point():
            return f"no kernel for {stored.dtype}"
        value = result.meta.get("val", result.meta.get("example_value"))
        dtype = value.dtype if isinstance(value, Tensor) else torch.float32
        if stored.quantized and dtype not in RESULTS:
            return f"no kernel for results of {dtype}"
        module = self._module(stored, args)
        codes = _codes(stored, dtype) if stored.quantized else None
        if isinstance(codes, str):
            return codes
        if codes is not None:
            hold_codes(module, codes)
        return read_table(module)

    def _module(self, stored: StoredWeight, args: Mapping[str, Any]) -> nn.Module:
        """A module that looks up as the node does; without values where these are codes."""
        weight = torch.empty(stored.data.shape, device="meta") if stored.quantized else stored.data
        rows, columns = weight.shape
        if self.owner is nn.Embedding:
            return nn.Embedding(rows, columns, _weight=weight)
        function = self.node.target is functional.embedding_bag
        mode, padding = args.get("mode", "mean" if function else 0), args.get("padding_idx")
        if operator_name(self.node).startswith("_") and padding == -1:
            padding = None  # ATen's inner operators have no other word for it
        return nn.EmbeddingBag(
            rows,
            columns,
            mode=mode if isinstance(mode, str) else MODES[mode],
            include_last_offset=bool(args.get("include_last_offset", False)),
            padding_idx=padding,
            _weight=weight,
        )


def _codes(stored: StoredWeight, dtype: torch.dtype) -> Codes | str:
    """Codes by rows, as values of `dtype`; or, in words, why there is no kernel for them."""
    assert stored.scale is not None
    assert stored.zero_point is not None
    if stored.dtype not in ("uint8", "int8"):
        return f"no kernel for {stored.dtype}"
    scale, zero_point = (
        v.float().expand(stored.data.shape) for v in (stored.scale, stored.zero_point)
    )
    if not all(bool((v == v[:, :1]).all()) for v in (scale, zero_point)):
        return f"no kernel for {stored.scheme}: scales differ within a row"
    shift = 128 if stored.dtype == "int8" else 0
    by_row = scale[:, 0].contiguous(), (zero_point[:, 0] + shift).contiguous()
    codes = (stored.data.to(torch.int16) + shift).to(torch.uint8)
    quantized = torch._make_per_channel_quantized_tensor(codes, *by_row, 0)
    return Codes(quantized, like=torch.empty(0, dtype=dtype, device=codes.device))
