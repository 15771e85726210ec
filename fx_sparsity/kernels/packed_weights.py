"""What packed layers and tables hold, as the gate reads it: `verify` sees lowered models."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_sparsity.graph.capture import module_source
from fx_sparsity.graph.operators import bind
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.lowered import LoweredLinear
from fx_sparsity.kernels.ops import NAMESPACE
from fx_sparsity.kernels.packing import PACKINGS, Packing
from fx_sparsity.kernels.rewrite import KERNELS
from fx_sparsity.quantization.stored import READERS, StoredWeight

_BY_OPERATOR = {f"{NAMESPACE}.{p.operator}.default": p for p in PACKINGS.values()}
_AGAIN = re.compile(r"__\d+$")
"""What `LowerNodes` adds to the name of a weight that has several nodes."""


def read_packed(model: nn.Module) -> Iterator[StoredWeight]:
    """The packed weights of a model: modules, and operators in a graph that read packed parts."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear):
            yield _linear(path, module)
        elif isinstance(module, RowPrunedEmbedding | RowPrunedEmbeddingBag):
            yield _table(path, module)
    if isinstance(model, fx.GraphModule):
        for node in model.graph.nodes:
            if (packing := _BY_OPERATOR.get(str(node.target))) is not None:
                yield from _node(model, node, packing)


def _linear(path: str, layer: SparseLinear) -> StoredWeight:
    names = [f"{path}.{name}".removeprefix(".") for name in layer._buffers]
    codes, scale = layer.dense_codes(), layer.scale
    stored = _stored(_weight_of(path), path, PACKINGS[layer.packing], codes, scale, names)
    if not isinstance(layer, LoweredLinear):
        return stored
    stored = replace(stored, view=layer.view)
    if not layer.transposed:
        return stored
    turned = {name: getattr(stored, name) for name in ("data", "scale", "zero_point")}
    turned = {name: value if value is None else value.t() for name, value in turned.items()}
    return replace(stored, roles=("in", "out"), **turned)


def _table(path: str, table: RowPrunedEmbedding | RowPrunedEmbeddingBag) -> StoredWeight:
    """Codes are read as their values, which are exactly zero where the code says zero."""
    names = [f"{path}.{name}".removeprefix(".") for name in table._buffers]
    values = table.dense_weight()
    one = None if values.dtype == table.rows.dtype else values.new_ones(1, 1)
    fqn = _weight_of(path)
    dtype = str(table.rows.dtype).removeprefix("torch.")
    return StoredWeight(
        fqn,
        fqn,
        dtype,
        "packed without zero rows",
        values,
        _refuses(fqn),
        one,
        None if one is None else one - 1,
        roles=("row", "dim"),
        made_of=tuple(names),
    )


def _node(model: fx.GraphModule, node: fx.Node, packing: Packing) -> Iterator[StoredWeight]:
    """The weight of an operator whose parts are tensors of the graph."""
    source, args = module_source(model), bind(node)
    found = {name: source(args[name]) for name in packing.parts}
    if None in found.values():
        return
    held: dict[str, tuple[str, Tensor]] = {name: f for name, f in found.items() if f is not None}
    parts = {name: tensor for name, (_, tensor) in held.items()}
    shape = torch.Size((args["out_features"], args["in_features"]))
    scaled = None if args["scale"] is None else source(args["scale"])
    codes = packing.unpack(parts, shape, parts["values"].dtype)
    names = [name for name, _ in (*held.values(), *filter(None, [scaled]))]
    path = names[0].rpartition(".")[0]
    scale = None if scaled is None else scaled[1]
    yield _stored(_weight_of(path), path, packing, codes, scale, names)


def _stored(
    fqn: str, path: str, packing: Packing, codes: Tensor, scale: Tensor | None, names: list[str]
) -> StoredWeight:
    """An [out, in] weight that lies in `packing`."""
    column = None if scale is None else scale.view(-1, 1)
    return StoredWeight(
        fqn,
        f"{path}.weight".removeprefix("."),
        str(codes.dtype).removeprefix("torch."),
        f"packed as {packing.name}" + ("" if scale is None else ", per-channel symmetric, axis 0"),
        codes,
        _refuses(fqn),
        column,
        None if column is None else torch.zeros_like(column),
        None if column is None else (-128, 127),
        roles=("out", "in"),
        made_of=tuple(names),
    )


def _weight_of(path: str) -> str:
    """The weight that a packed layer at `path` stands for; in graphs the path names it."""
    if path.startswith(f"{KERNELS}."):
        return _AGAIN.sub("", path.removeprefix(f"{KERNELS}."))
    return f"{path}.weight".removeprefix(".")


def _refuses(fqn: str) -> Any:
    def write(values: Tensor) -> None:
        raise TypeError(f"{fqn} is packed: unlower the model before its weights are changed")

    return write


READERS.append(read_packed)
