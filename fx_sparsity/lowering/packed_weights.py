"""What packed layers and tables hold, as the gate reads it: `verify` sees lowered models."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.calls import bind
from fx_sparsity.graph.sources import module_source
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.embedding_ops import BAG, LOOKUP
from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.ops import NAMESPACE
from fx_sparsity.kernels.packed_module import PackedModule
from fx_sparsity.kernels.packings import PACKINGS, Packing, PackingError
from fx_sparsity.kernels.row_table import RowTable
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.lowering.rewrite import KERNELS
from fx_sparsity.verification.read import READERS
from fx_sparsity.verification.stored import StoredWeight

_BY_OPERATOR = {f"{NAMESPACE}.{p.operator}": p for p in PACKINGS.values()}
_LOOKUPS = {f"{NAMESPACE}.{name}.default" for name in (LOOKUP, BAG)}
_AGAIN = re.compile(r"__\d+$")
"""What `LowerNodes` adds to the name of a weight that has several nodes."""


def read_packed(model: nn.Module) -> Iterator[StoredWeight]:
    """The packed weights of a model: modules, and operators in a graph that read packed parts."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear):
            yield _linear(path, module)
        elif isinstance(module, RowPrunedEmbedding | RowPrunedEmbeddingBag):
            names = [f"{path}.{name}".removeprefix(".") for name in module._buffers]
            yield _table(path, module.table, module.dtype, names)
    if isinstance(model, fx.GraphModule):
        for node in model.graph.nodes:
            if str(node.target) in _LOOKUPS and (table := _read_table(model, node)) is not None:
                yield _table(*table)
            packing = _BY_OPERATOR.get(str(node.target))
            if packing is None:
                continue
            if (read := _read_node(model, node, packing)) is None:
                yield from _partly_held(model, node, packing)
            else:
                codes = packing.unpack(read.parts, read.shape, read.parts["values"].dtype)
                fqn = _weight_of(read.path)
                yield _stored(fqn, read.path, packing, codes, read.scale, read.names)


def check_packed(model: nn.Module | ExportedProgram) -> None:
    """Raise unless kernels can read every packed weight safely: for models from elsewhere.

    Layers and tables check themselves when they are built, unpickled, or loaded from a state dict.
    Graphs and programs do not, whose parts are plain tensors: check those that come from files that
    somebody else may have written, before they run.

    Args:
        model: lowered, or of any kind; not changed.

    Raises:
        PackingError: the name of the weight, and what is corrupt.
    """
    module = model.module() if isinstance(model, ExportedProgram) else model
    for path, inner in module.named_modules():
        with _naming(_weight_of(path)):
            if isinstance(inner, PackedModule):
                inner.check()
    if not isinstance(module, fx.GraphModule):
        return
    for node in module.graph.nodes:
        if str(node.target) in _LOOKUPS and (table := _read_table(module, node)) is not None:
            with _naming(_weight_of(table[0])):
                table[1].check()
        packing = _BY_OPERATOR.get(str(node.target))
        if packing is not None and (read := _read_node(module, node, packing)) is not None:
            with _naming(_weight_of(read.path)):
                packing.check(read.parts, read.shape, read.parts["values"].dtype)


@contextmanager
def _naming(fqn: str) -> Iterator[None]:
    try:
        yield
    except PackingError as error:
        raise PackingError(f"{fqn}: {error}") from error


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


def _table(path: str, table: RowTable, dtype: torch.dtype, names: list[str]) -> StoredWeight:
    """Codes are read as their values, which are exactly zero where the code says zero."""
    indices = torch.arange(table.remap.numel(), device=table.remap.device)
    values = table.look_up(indices, dtype)
    one = None if values.dtype == table.rows.dtype else values.new_ones(1, 1)
    fqn = _weight_of(path)
    return StoredWeight(
        fqn,
        fqn,
        str(table.rows.dtype).removeprefix("torch."),
        "packed without zero rows",
        values,
        _refuses(fqn),
        one,
        None if one is None else one - 1,
        roles=("row", "dim"),
        made_of=tuple(names),
    )


@dataclass(frozen=True)
class _Read:
    """What an operator reads: packed parts, their shape, scales, and the names of all of these."""

    parts: dict[str, Tensor]
    shape: torch.Size
    scale: Tensor | None
    names: list[str]

    @property
    def path(self) -> str:
        """That the names share."""
        return self.names[0].rpartition(".")[0]


def _read_node(model: fx.GraphModule, node: fx.Node, packing: Packing) -> _Read | None:
    """What an operator reads; None where that is computed, and not held by the graph."""
    source, args = module_source(model), bind(node)
    found = {name: source(args[name]) for name in packing.parts}
    held: dict[str, tuple[str, Tensor]] = {name: f for name, f in found.items() if f is not None}
    if len(held) < len(found):
        return None
    scaled = None if args["scale"] is None else source(args["scale"])
    return _Read(
        {name: tensor for name, (_, tensor) in held.items()},
        torch.Size((args["out_features"], args["in_features"])),
        None if scaled is None else scaled[1],
        [name for name, _ in (*held.values(), *filter(None, [scaled]))],
    )


def _read_table(
    model: fx.GraphModule, node: fx.Node
) -> tuple[str, RowTable, torch.dtype, list[str]] | None:
    """Path, table, dtype and names of what a lookup reads; None where the graph has none of it."""
    source, args = module_source(model), bind(node)
    found = {name: source(args[name]) for name in ("rows", "affine", "remap") if args[name]}
    held = {name: tensor for name, tensor in found.items() if tensor is not None}
    if len(held) < len(found):
        return None
    names = [fqn for fqn, _ in held.values()]
    parts: dict[str, Any] = {"affine": None} | {name: tensor for name, (_, tensor) in held.items()}
    table = RowTable(**parts, columns=args["columns"])
    return names[0].rpartition(".")[0], table, getattr(torch, args["dtype"]), names


def _partly_held(model: fx.GraphModule, node: fx.Node, packing: Packing) -> Iterator[StoredWeight]:
    """A weight of which the graph holds some parts, and not all."""
    source, args = module_source(model), bind(node)
    found = {name: source(args[name]) for name in packing.parts}
    names = [held[0] for held in found.values() if held is not None]
    if names:
        path = names[0].rpartition(".")[0]
        lacking = ", ".join(name for name, held in found.items() if held is None)
        shape = args["out_features"], args["in_features"]
        codes = torch.empty(shape, device="meta")
        stored = _stored(_weight_of(path), path, packing, codes, None, names)
        obstacle = (
            f"its {lacking} cannot be read: AOTInductor writes what has up to 8 elements into the "
            "code, but for inductor_configs={'always_keep_tensor_constants': True}"
        )
        yield replace(stored, obstacle=obstacle)


def _stored(
    fqn: str, path: str, packing: Packing, codes: Tensor, scale: Tensor | None, names: list[str]
) -> StoredWeight:
    """An [out, in] weight that lies in `packing`; float8 codes are read as their values."""
    integers = codes.dtype == torch.int8
    column = None if scale is None else scale.view(-1, 1)
    return StoredWeight(
        fqn,
        f"{path}.weight".removeprefix("."),
        str(codes.dtype).removeprefix("torch."),
        f"packed as {packing.name}" + ("" if scale is None else ", per-channel symmetric, axis 0"),
        codes if integers or column is None else codes.float(),
        _refuses(fqn),
        column,
        None if column is None else torch.zeros_like(column),
        (-128, 127) if integers else None,
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
