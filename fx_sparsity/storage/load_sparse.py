"""Loading a compressed file straight into modules that compute with compressed weights."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.ao.nn.quantized as nnq
from torch import fx, nn

from fx_sparsity.kernels import SparseLinear
from fx_sparsity.kernels.packings import packing_for
from fx_sparsity.lowering.dense_tables import ROWS, DenseTable, Lookup
from fx_sparsity.lowering.graph_places import node_places
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.lowering.places import GraphPlace, ModulePlace, module_places
from fx_sparsity.lowering.plan import Planned, pack_all
from fx_sparsity.lowering.policy import Choice, not_smaller
from fx_sparsity.lowering.rewrite import LowerNodes
from fx_sparsity.lowering.table_nodes import TableNode, held_by
from fx_sparsity.quantization.codes import CodedWeight
from fx_sparsity.reports import Table, WeightReport
from fx_sparsity.sparsifier.hub_refusals import guard_saving
from fx_sparsity.storage.compressed_file import CompressedFile
from fx_sparsity.storage.container import elements_of
from fx_sparsity.storage.loading import check_fits, check_sums
from fx_sparsity.storage.module_state import fill_modules, own_states
from fx_sparsity.verification.stored import is_float

_PACKINGS = {"two_four": ("nm", "bitmask"), "block": ("block", "bitmask")}
"""Format of a matrix in a file -> packings of the kernels to try; `bitmask` for all others."""
_CODED = (nnq.Embedding, CodedWeight)
"""Tables whose format tells little: their zero points are floats, and pruned codes may be any."""


@dataclass(frozen=True)
class LoadedWeight:
    """A matrix that is stored sparse, or a quantized table.

    Attributes:
        fqn: of the weight.
        module: class of the module that holds it compressed; None where it stays dense.
        reason: why it stays dense; empty otherwise.
    """

    fqn: str
    module: str | None
    reason: str = ""


@dataclass(frozen=True)
class LoadReport(WeightReport[LoadedWeight]):
    """FQN -> `LoadedWeight`, for each matrix that is stored sparse, and each quantized table."""

    rows: tuple[LoadedWeight, ...]

    @property
    def dense(self) -> dict[str, str]:  # type: ignore[override]
        """FQN -> the reason why it stays dense."""
        return {row.fqn: row.reason for row in self.rows if row.module is None}

    @property
    def tables(self) -> tuple[Table, ...]:
        """A row a weight."""
        cells = [(row.fqn, row.module or f"dense: {row.reason}") for row in self.rows]
        return (Table(("weight", "loaded as"), cells),)

    @property
    def summary(self) -> str:
        """How many weights stay compressed."""
        return f"{len(self) - len(self.dense)} of {len(self)} weights stay compressed"

    def __str__(self) -> str:
        return str(self.tables[0])


@torch.no_grad()
def load_sparse(path: str | Path, model: nn.Module, *, check: bool = False) -> LoadReport:
    """Load what `save` wrote, keeping sparse weights compressed: their modules are replaced.

    A linear layer whose weight is stored sparse becomes a `SparseLinear`, an embedding or bag with
    pruned rows a `RowPrunedEmbedding` or `RowPrunedEmbeddingBag`; these are for inference. Layers
    that torchao or `torch.ao` have quantized to 8 bits are, too, as `lower` would replace them; and
    `unlower` puts dense modules back. Of these modules one at a time is dense in memory, besides
    what the model holds: nothing, where its parameters are on the meta device
    (`parameters_on_meta`). What a GraphModule reads itself, such as all that pt2e has quantized, is
    loaded dense and packed then. A table stays dense where that takes no more bytes; whether
    compressed weights are faster is not asked here.

    Args:
        path: of the file.
        model: quantized as the one that was saved; changed in place.
        check: compare every tensor with its checksum, too, as `load` does.

    Returns:
        What holds each matrix that is stored sparse, and each quantized table, now.

    Raises:
        FileFormatError: the file contradicts itself; the model is as it was.
        RuntimeError: the file does not fit the model, which is as it was; or a module refuses its
            state by a rule of its own, when others may have loaded theirs.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> model[0].weight.data[:, ::2] = 0
        >>> fxs.save(model, "model.safetensors")
        >>> print(fxs.load_sparse("model.safetensors", model))
        weight    loaded as
        --------  ------------
        0.weight  SparseLinear
    """
    file = CompressedFile(path)
    if check:
        check_sums(file)
    check_fits(file, (entry for _, _, own in own_states(model) for entry in own.items()))
    matrices = _matrices(file)
    weights = _weights(file, matrices, module_places(model))
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    rows: list[LoadedWeight] = []
    made: dict[ModulePlace, LoweredLinear | Lookup] = {}
    for place, names in weights.items():
        name = names[-1]  # as the last one is loaded into a module that several share
        if uses[id(place.tensor)] > 1:
            if name in file.forms and file.form(name) != "dense":  # said once, of all names
                rows.append(LoadedWeight(place.fqn, None, "tied to another weight"))
        elif file.form(name) != "dense" or isinstance(place.module, _CODED):
            packed = _packed(file, place, file.form(name))
            if isinstance(packed, str):
                rows.append(LoadedWeight(place.fqn, None, packed))
            else:
                made[place] = packed
                rows.append(LoadedWeight(place.fqn, _class_of(packed)))
    known = {name for names in weights.values() for name in names}
    fill_modules(file, model, but={inner for place in made for inner in place.module.modules()})
    for place, packed in made.items():
        place.put(model, packed.train(place.module.training))
    nodes: dict[GraphPlace, LoweredLinear | Lookup] = {}
    if isinstance(model, fx.GraphModule):
        found, nodes = _pack_nodes(file, model, matrices)
        rows += found.values()
        known |= found.keys()
        LowerNodes(nodes)(model)
    rows += _others(file, model, matrices, known)
    if made or nodes:
        guard_saving(model)
    return LoadReport(tuple(rows))


def _matrices(file: CompressedFile) -> dict[str, str]:
    """Entry of the state -> its largest tensor of two dimensions, for entries that have one."""
    found = {}
    for entry in file.keys:
        sizes = {
            name: elements_of(shape)
            for name in sorted(file.members.get(entry, [entry]))
            if len(shape := file.dtype_and_shape(name)[1]) == 2
        }
        if sizes:
            found[entry] = max(sizes, key=lambda name: sizes[name])
    return found


def _weights(
    file: CompressedFile, matrices: Mapping[str, str], places: Iterable[ModulePlace]
) -> dict[ModulePlace, list[str]]:
    """Place -> the tensors in the file that are its weight: the largest matrices in its module.

    There are several where modules that the model shares were saved as two.
    """
    by_path = {path: place for place in places for path in place.paths}
    found: dict[ModulePlace, list[str]] = {}

    def size(name: str) -> int:
        return elements_of(file.dtype_and_shape(name)[1])

    for entry, name in matrices.items():
        path = entry.rpartition(".")[0]
        while path and path not in by_path:  # torch.ao's modules keep theirs in a child
            path = path.rpartition(".")[0]
        place = by_path.get(path)
        if place is None:
            continue
        names = found.setdefault(place, [name])
        if size(name) > size(names[0]):
            found[place] = [name]
        elif size(name) == size(names[0]) and name not in names:
            names.append(name)
    return found


def _packed(file: CompressedFile, place: ModulePlace, form: str) -> LoweredLinear | Lookup | str:
    """What takes the place of a module; or, in words, why it stays dense.

    Args:
        file: that holds its state.
        place: of the module, which is not changed.
        form: format in which the file holds the weight.
    """
    if "" in place.paths:
        return "the model itself"
    if isinstance(seen := place.look(), str):  # before a module of any kind is copied
        return place.obstacle or seen
    filled = replace(place, module=copy.deepcopy(place.module))
    fill_modules(file, filled.module, place.paths[-1])
    layer = filled.look()
    if isinstance(layer, str):
        return layer
    if reason := place.against(layer):
        return reason
    packed = _pack(layer, form)
    if isinstance(packed, LoweredLinear):
        packed.original, packed.transposed = filled.original(), place.transposed
    return packed


def _pack(layer: DenseLinear | DenseTable, form: str) -> LoweredLinear | Lookup | str:
    """A layer in the packing that goes with its format in the file; or why it stays dense."""
    packings = [ROWS]
    if isinstance(layer, DenseLinear):
        names = _PACKINGS.get(form, ("bitmask",))
        packings = [packing_for(name, layer.device, layer.in_groups) for name in names]
    refusals = {packing: layer.refusal(packing) for packing in packings}
    fitting = next((packing for packing, refusal in refusals.items() if refusal is None), None)
    if fitting is None:
        return "; ".join(f"{packing}: {refusal}" for packing, refusal in refusals.items())
    try:
        packed = layer.pack(fitting)
    except ValueError as error:  # such as scales that are not finite
        return str(error)
    if isinstance(layer, DenseTable) and packed.nbytes >= layer.nbytes:  # the remap takes some
        return not_smaller(fitting, packed.nbytes, layer.nbytes)
    return packed


def _pack_nodes(
    file: CompressedFile, model: fx.GraphModule, matrices: Mapping[str, str]
) -> tuple[dict[str, LoadedWeight], dict[GraphPlace, LoweredLinear | Lookup]]:
    """Pack what a graph reads itself.

    Args:
        file: that holds it.
        model: with what the file holds.
        matrices: entry of the state -> tensor.

    Returns:
        Tensor in the file -> what becomes of it; and what takes the place of which node.
    """
    rows: dict[str, LoadedWeight] = {}
    planned: list[Planned] = []
    for place in node_places(model):
        held = held_by(place.source, place.weight)
        name = None if held is None else matrices.get(held[0])
        if held is None or name is None:
            continue
        coded = isinstance(place, TableNode) and not is_float(held[1])
        if file.form(name) == "dense" and not coded:
            continue
        layer = place.look()
        if isinstance(layer, str):
            rows[name] = LoadedWeight(place.fqn, None, layer)
            continue
        packed = place.against(layer) or _pack(layer, file.form(name))
        if isinstance(packed, str):
            rows[name] = LoadedWeight(place.fqn, None, packed)
        else:
            rows.setdefault(name, LoadedWeight(place.fqn, _class_of(packed)))
            packing = packed.packing if isinstance(packed, SparseLinear) else ROWS
            planned.append(Planned(place, layer, Choice(packing, packed=packed)))
    places = pack_all(planned)
    return rows, {p: new for p, new in places.items() if isinstance(p, GraphPlace)}


def _others(
    file: CompressedFile, model: nn.Module, matrices: Mapping[str, str], known: set[str]
) -> list[LoadedWeight]:
    """Rows of the report for sparse matrices that no layer of a known kind holds.

    Args:
        file: that holds them.
        model: to be loaded.
        matrices: entry of the state -> tensor.
        known: tensors that are weights of layers.
    """
    rows = []
    for entry, name in matrices.items():
        columns = file.dtype_and_shape(name)[1][1]  # scales and zero points stand in one
        if name in known or name not in file.forms or columns < 2 or file.form(name) == "dense":
            continue
        path, _, attribute = entry.rpartition(".")
        if path.endswith("._packed_params"):  # where torch.ao's modules keep their weight
            path, attribute = path.removesuffix("._packed_params"), "weight"
        owner = model.get_submodule(path)
        fqn = f"{path}.{attribute}".removeprefix(".")
        rows.append(LoadedWeight(fqn, None, f"held by a {owner._get_name()}"))
    return rows


def _class_of(packed: LoweredLinear | Lookup) -> str:
    """The public name of a packed module's class."""
    return SparseLinear.__name__ if isinstance(packed, SparseLinear) else type(packed).__name__
