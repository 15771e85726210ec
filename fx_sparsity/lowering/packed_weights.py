"""What packed layers and tables hold, as the gate reads it: `verify` sees lowered models."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.calls import bind
from fx_sparsity.graph.sources import module_source
from fx_sparsity.kernels import group_scales
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.kernels.embedding_ops import BAG, LOOKUP
from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.kernels.ops import NAMESPACE
from fx_sparsity.kernels.packed_module import PackedModule
from fx_sparsity.kernels.packings import INT4, PACKINGS, Packing, PackingError
from fx_sparsity.kernels.row_table import RowTable
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.lowering.rewrite import KERNELS
from fx_sparsity.verification.read import READERS
from fx_sparsity.verification.stored import StoredWeight

_BY_OPERATOR = {f"{NAMESPACE}.{p.operator}": p for p in PACKINGS.values()}
_LOOKUPS = {f"{NAMESPACE}.{name}.default" for name in (LOOKUP, BAG)}
_DIFFERENCES = (-15, 15)
"""Of 4-bit codes and zero points."""
_ZERO_POINTS = "zero_points"
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
        for call in _linear_calls(model):
            yield call.stored()
        for path, table, dtype, names in _looked_up(model):
            yield _table(path, table, dtype, names)


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
    for call in _linear_calls(module):
        with _naming(call.fqn):
            call.check()
    for path, table, _, _ in _looked_up(module):
        with _naming(_weight_of(path)):
            table.check()


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
class _LinearCall:
    """A call in a graph of an operator that multiplies with a packed weight.

    Attributes:
        packing: of the weight.
        shape: [out, in].
        parts: of the packing, as far as the graph holds them.
        scale: of the codes; None where there is none, or where the graph does not hold it.
        names: of these tensors.
        lacking: parts that the operator is given, and that the graph does not hold.
    """

    packing: Packing
    shape: torch.Size
    parts: Mapping[str, Tensor]
    scale: Tensor | None
    names: list[str]
    lacking: list[str]

    @property
    def path(self) -> str:
        """That the names share."""
        return self.names[0].rpartition(".")[0]

    @property
    def fqn(self) -> str:
        """Of the weight."""
        return _weight_of(self.path)

    @property
    def is_whole(self) -> bool:
        """Whether all of the packing is there; scales are not of it."""
        return self.parts.keys() == set(self.packing.parts)

    def check(self) -> None:
        """Raise `PackingError` for what is corrupt."""
        if self.is_whole:
            self.packing.check(self.parts, self.shape, self.parts["values"].dtype)

    def stored(self) -> StoredWeight:
        """What it holds; with an obstacle where that cannot be read."""
        codes = torch.empty(self.shape, device="meta")
        if self.is_whole:
            codes = self.packing.unpack(self.parts, self.shape, self.parts["values"].dtype)
        stored = _stored(self.fqn, self.path, self.packing, codes, self.scale, self.names)
        if not self.lacking:
            return stored
        obstacle = (
            f"its {', '.join(self.lacking)} cannot be read: AOTInductor writes what has up to 8 "
            "elements into the code, but for "
            "inductor_configs={'always_keep_tensor_constants': True}"
        )
        return replace(stored, obstacle=obstacle)


def _linear_calls(model: fx.GraphModule) -> Iterator[_LinearCall]:
    """The calls of a graph that read packed parts which it holds, or some of them."""
    for node in model.graph.nodes:
        if (packing := _BY_OPERATOR.get(str(node.target))) is None:
            continue
        held, lacking = _held(model, node, (*packing.parts, "scale"))
        if held:
            args = bind(node)
            parts = {part: tensor for part, (_, tensor) in held.items() if part != "scale"}
            if lacking == [_ZERO_POINTS]:
                # AOTInductor leaves out what has up to 8 elements; those that there are have 16.
                parts[_ZERO_POINTS], lacking = torch.zeros(0, dtype=torch.int8), []
            yield _LinearCall(
                packing,
                torch.Size((args["out_features"], args["in_features"])),
                parts,
                held["scale"][1] if "scale" in held else None,
                [name for name, _ in held.values()],
                lacking,
            )


def _looked_up(
    model: fx.GraphModule,
) -> Iterator[tuple[str, RowTable, torch.dtype, list[str]]]:
    """Path, table, dtype and names of what each lookup of a graph reads, where it holds that."""
    for node in model.graph.nodes:
        if str(node.target) not in _LOOKUPS:
            continue
        held, lacking = _held(model, node, ("rows", "affine", "remap"))
        if not lacking:
            args, affine = bind(node), held.get("affine")
            table = RowTable(
                rows=held["rows"][1],
                affine=None if affine is None else affine[1],
                remap=held["remap"][1],
                columns=args["columns"],
            )
            names = [name for name, _ in held.values()]
            yield names[0].rpartition(".")[0], table, getattr(torch, args["dtype"]), names


def _held(
    model: fx.GraphModule, node: fx.Node, parts: Sequence[str]
) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """Part -> name and tensor of those that the graph holds; and the parts that it does not."""
    source, args = module_source(model), bind(node)
    found = {part: source(args[part]) for part in parts if args[part] is not None}
    held = {part: tensor for part, tensor in found.items() if tensor is not None}
    return held, [part for part in found if part not in held]


def _stored(
    fqn: str, path: str, packing: Packing, codes: Tensor, scale: Tensor | None, names: list[str]
) -> StoredWeight:
    """An [out, in] weight that lies in `packing`; float8 codes are read as their values."""
    integers, four_bits = codes.dtype == torch.int8, packing.name in INT4
    column = None if scale is None else group_scales.expanded(scale, codes.shape)
    by = "per-channel symmetric, axis 0"
    if four_bits:
        by = "by groups of inputs, codes less their zero points"
    return StoredWeight(
        fqn,
        f"{path}.weight".removeprefix("."),
        "int4" if four_bits else str(codes.dtype).removeprefix("torch."),
        f"packed as {packing.name}" + ("" if scale is None else f", {by}"),
        codes if integers or column is None else codes.float(),
        _refuses(fqn),
        column,
        None if column is None else torch.zeros_like(column),
        _DIFFERENCES if four_bits else (-128, 127) if integers else None,
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
