"""Calibration batches, the graphs that take them, and the uses of weights in these."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fx_sparsity.graph.context_blocks import OpenBlocks
from fx_sparsity.graph.discovery import find_weights, read_graph
from fx_sparsity.graph.example_inputs import ExampleInputs, InputError, call_arguments
from fx_sparsity.graph.frontends import CaptureError, export_model
from fx_sparsity.graph.opaque import copied, expanded
from fx_sparsity.graph.sources import module_source, named_tensors
from fx_sparsity.graph.uses import canonical_fqn, weight_uses
from fx_sparsity.graph.weight_map import Use, WeightMap
from fx_sparsity.pruning.offload import Keep, in_memory
from fx_sparsity.pruning.padding import Padding, read_padding

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of the model.

    Attributes:
        number: its place among the batches.
        inputs: as the user gave them: a tuple or a dict.
        args: positional arguments.
        kwargs: keyword arguments.
        leaves: tensors and other values, in the order of the graph's placeholders; of what is no
            pytree, its tensors.
        spec: how they are nested.
        padding: which of its tokens count.
        held_out: whether weights are judged by it, and not solved with it.
    """

    number: int
    inputs: ExampleInputs
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    padding: Padding
    held_out: bool = False

    def call(self, model: nn.Module) -> Any:
        """What the model returns.

        Raises:
            InputError: whatever the model raises, with its own words.
        """
        try:
            return model(*copied(self.args), **copied(self.kwargs))
        except Exception as error:
            raise InputError(
                f"batch {self.number}: {type(model).__name__} raises "
                f"{type(error).__name__}: {error}"
            ) from error


def check_iterable(batches: Iterable[ExampleInputs]) -> None:
    """Raise for what is no iterable of batches.

    Raises:
        InputError: `batches` is a single one, whose rows or names are no batches.
    """
    if isinstance(batches, Tensor | Mapping | str):
        raise InputError(
            f"batches: expected an iterable of batches, found one {type(batches).__name__}; "
            "pass a list of batches, such as [batch]"
        )


def read_batches(
    model: nn.Module,
    batches: Iterable[ExampleInputs],
    token_weights: Iterable[Tensor] | None = None,
    keep: Keep = in_memory,
) -> list[Batch]:
    """Check batches, and flatten them; each is read once.

    Args:
        model: that takes them.
        batches: as `prune` takes them.
        token_weights: as `prune` takes them.
        keep: keeps their tensors.

    Raises:
        InputError: there is none, one is no call's arguments, or lies on a device where the model
            has no tensor; or `batches` is a single one, whose rows or names are no batches; or
            there are other numbers of batches and of `token_weights`.
    """
    check_iterable(batches)
    given = None if token_weights is None else list(token_weights)
    weights = None if given is None else iter(given)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    read: list[Batch] = []
    for number, inputs in enumerate(batches):
        args, kwargs = keep(call_arguments(inputs))
        kwargs = dict(sorted(kwargs.items()))
        inputs = kwargs or args
        if is_exported(model):
            args, kwargs = _by_signature(model, args, kwargs)
        leaves, spec = pytree.tree_flatten((expanded(args), expanded(kwargs)))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and devices and leaf.device not in devices:
                raise InputError(
                    f"batch {number} has a tensor on {leaf.device}, but the model is on "
                    f"{', '.join(sorted(map(str, devices)))}; move one of them"
                )
        padding = read_padding(model, inputs, None if weights is None else next(weights, None))
        read.append(Batch(number, inputs, args, kwargs, tuple(leaves), spec, padding))
    if not read:
        raise InputError("batches: expected at least one batch of inputs, found none")
    if given is not None and len(given) != len(read):
        raise InputError(
            f"token_weights: expected one for each of {len(read)} batches, found {len(given)}"
        )
    return read


@torch.no_grad()
def check_forms(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise for batches of dtypes or layouts that the model rejects.

    Graphs are captured without data, where dtypes that do not go together go unnoticed until they
    meet. So the model is run once for every form of batch other than the first, and for the first
    where it has a floating dtype that is not among the model's.

    Args:
        model: in the mode that is to be captured.
        batches: of any shapes.

    Raises:
        InputError: the model rejects a batch, with its own words.
    """
    own = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    seen: set[tuple[Any, ...]] = set()
    for batch in batches:
        tensors = [leaf for leaf in batch.leaves if isinstance(leaf, Tensor)]
        form = tuple((tensor.dtype, tensor.layout) for tensor in tensors)
        usual = all(
            t.layout == torch.strided and (t.dtype in own or not t.is_floating_point())
            for t in tensors
        )
        if form not in seen and (seen or not usual):
            batch.call(model)
        seen.add(form)


@dataclass(frozen=True)
class Captured:
    """A graph, which shares its tensors with the model, and the batches that run through it."""

    graph: fx.GraphModule
    batches: tuple[Batch, ...]


class GraphUse(NamedTuple):
    """One use of a weight in a graph.

    Attributes:
        fqn: of the weight.
        node: the consumer.
        use: what discovery knows of it.
        constant: whether the consumer is the same for all inputs.
    """

    fqn: str
    node: fx.Node
    use: Use
    constant: bool


def find_uses(graph: fx.GraphModule, weights: WeightMap) -> list[GraphUse]:
    """Every use of the weights of a map, in graph order; those in subgraphs, too."""
    named = canonical_names(weights)
    found = []
    for consumption in weight_uses(graph.graph, module_source(graph)):
        fqn = named.get(canonical_fqn(consumption.origin.fqn))
        use = consumption.use()
        if fqn is not None and use is not None:
            found.append(GraphUse(fqn, consumption.node, use, consumption.constant))
    return found


def canonical_names(weights: WeightMap) -> dict[str, str]:
    """Every name of every weight -> its canonical one."""
    return {name: site.fqn for site in weights.sites for name in site.names}


class Frame(NamedTuple):
    """A model as it was captured, with all batches.

    Attributes:
        model: that was captured.
        weights: of the model.
        captured: graphs; none where no graph can be captured.
        uses: of the weights, graph by graph.
        reason: which graphs there are, or why none.
        error: why no graph can be captured.
        keep: keeps activations until they are needed.
    """

    model: nn.Module
    weights: WeightMap
    captured: Sequence[Captured]
    uses: Sequence[Sequence[GraphUse]]
    reason: str
    error: CaptureError | None = None
    keep: Keep = in_memory

    def uses_of(self, fqn: str) -> list[GraphUse]:
        """Uses of one weight in the first graph; none where there is no graph."""
        return [use for use in self.uses[0] if use.fqn == fqn] if self.uses else []


def is_exported(model: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether a module is that of an exported program: a graph of operators, noted on its inputs.

    Its mode is in its operators.
    """
    return (
        isinstance(model, fx.GraphModule)
        and hasattr(model.graph._codegen, "pytree_info")
        and all("val" in node.meta for node in model.graph.find_nodes(op="placeholder"))
        and not model.graph.find_nodes(op="call_method")
        and not any(
            named_tensors(model.get_submodule(str(node.target)))
            for node in model.graph.find_nodes(op="call_module")
        )
    )


def _signature(graph: fx.GraphModule) -> Any:
    """Names and nesting of the inputs of an exported program's module."""
    return graph.graph._codegen.pytree_info  # type: ignore[attr-defined]


def _by_signature(
    graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call, those that were positional or named at the export like there."""
    signature = _signature(graph)
    positional = signature.orig_args[: signature.in_spec.child(0).num_children]
    if not args:
        args = tuple(kwargs[name] for name in positional if name in kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in positional}
    order = {name: place for place, name in enumerate(signature.orig_args)}
    return args, dict(sorted(kwargs.items(), key=lambda item: order.get(item[0], len(order))))


def capture(model: nn.Module, batches: Sequence[Batch], dynamic_shapes: Any = None) -> Frame:
    """Graphs of a model for all batches, and the uses of its weights in them.

    Where no graph can be captured there are none, and the frame says so.

    Args:
        model: in the mode that is to be captured.
        batches: of any shapes.
        dynamic_shapes: as `torch.export.export` takes it; by default the dimensions that differ
            between batches of the same nesting.

    Raises:
        InputError: the model rejects a batch.
        ValueError: `dynamic_shapes` of a graph, which has its shapes already.
    """
    if is_exported(model):
        if dynamic_shapes is not None:
            raise ValueError("dynamic_shapes: a graph has the shapes that it was exported with")
        graph = _taking(model, batches)
        weights = read_graph(model, graph)
        captured = [Captured(graph, tuple(batches))]
        return Frame(model, weights, captured, [find_uses(graph, weights)], "its own graph")
    try:
        captured = capture_graphs(model, batches, dynamic_shapes)
    except CaptureError as error:
        weights = find_weights(model, batches[0].inputs)
        cause = type(error.__cause__ or error).__name__
        return Frame(model, weights, (), (), f"no graph ({cause})", error)
    weights = read_graph(model, captured[0].graph)
    uses = [find_uses(found.graph, weights) for found in captured]
    count = len(captured)
    return Frame(model, weights, captured, uses, f"{count} graph{'' if count == 1 else 's'}")


def _taking(model: fx.GraphModule, batches: Sequence[Batch]) -> fx.GraphModule:
    """A copy of a graph, which shares its tensors, and stays as it is when that one is masked.

    Raises:
        InputError: it does not take one of the batches.
    """
    expected = _signature(model).in_spec
    for batch in batches:
        if batch.spec != expected or not _fits(model, batch):
            given = ", ".join(map(_form, batch.leaves))
            noted = ", ".join(
                f"{node.name} {_form(node.meta['val'])}"
                for node in model.graph.find_nodes(op="placeholder")
            )
            raise InputError(
                f"batch {batch.number}: the graph takes {noted}; the batch is {given}. "
                "Export it with these shapes, or with dynamic ones"
            )
    graph = over_same_tensors(model)
    OpenBlocks()(graph)
    return graph


def over_same_tensors(model: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph, over the very parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for _, tensor in named_tensors(model)})


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


def capture_graphs(
    model: nn.Module, batches: Sequence[Batch], dynamic_shapes: Any = None
) -> list[Captured]:
    """Graphs for all batches: one whose varying sizes are dynamic, else one for each shape.

    Args:
        model: in the mode that is to be captured.
        batches: of any shapes.
        dynamic_shapes: as `torch.export.export` takes it; by default the dimensions that differ
            between batches of the same nesting.

    Raises:
        InputError: the model rejects a batch.
        CaptureError: no graph can be captured for one of them.
    """
    captured: list[Captured] = []
    left = list(batches)
    while left:
        alike = [batch for batch in left if batch.spec == left[0].spec]
        shapes = dynamic_shapes if dynamic_shapes is not None else _varying(alike)
        try:
            graph = _export(model, left[0], shapes, given=dynamic_shapes is not None)
        except InputError as error:
            raise InputError(f"batch {left[0].number} of the calibration data: {error}") from error
        fitting = [batch for batch in alike if _fits(graph, batch)]
        if left[0] not in fitting:
            raise CaptureError(f"the graph of batch {left[0].number} does not take that batch")
        captured.append(Captured(graph, tuple(fitting)))
        taken = {batch.number for batch in fitting}
        left = [batch for batch in left if batch.number not in taken]
    if len(captured) > 1:
        _log.info("batches of different shapes take %d graphs", len(captured))
    return captured


def _export(model: nn.Module, batch: Batch, shapes: Any, given: bool) -> fx.GraphModule:
    if shapes is not None:
        try:
            return _module(export_model(model, batch.inputs, shapes))
        except CaptureError as error:
            if given:
                raise
            _log.info("no graph of dynamic shapes, one for each shape instead: %s", error)
    return _module(export_model(model, batch.inputs))


def _module(program: ExportedProgram) -> fx.GraphModule:
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    OpenBlocks()(module)
    return module


def _varying(batches: Sequence[Batch]) -> Any:
    """Dynamic shapes for the dimensions that differ between batches; None where none does."""
    dynamic: list[dict[int, Any] | None] = []
    for leaves in zip(*(batch.leaves for batch in batches), strict=True):
        if not all(isinstance(leaf, Tensor) and leaf.ndim == leaves[0].ndim for leaf in leaves):
            dynamic.append(None)
            continue
        sizes = zip(*(leaf.shape for leaf in leaves), strict=True)
        marks = {
            dim: torch.export.Dim.AUTO for dim, found in enumerate(sizes) if len(set(found)) > 1
        }
        dynamic.append(marks or None)
    if not any(dynamic):
        return None
    args, kwargs = pytree.tree_unflatten(dynamic, batches[0].spec)
    return kwargs or args


def _fits(graph: fx.GraphModule, batch: Batch) -> bool:
    """Whether a graph takes a batch, going by what it noted of its inputs and by its guards."""
    nodes = graph.graph.find_nodes(op="placeholder")
    values = dict(zip(nodes, batch.leaves, strict=True))
    for node, leaf in values.items():
        seen = node.meta.get("val")
        if isinstance(leaf, Tensor) != isinstance(seen, Tensor):
            return False
        if isinstance(leaf, Tensor):
            if (seen.dtype, seen.ndim) != (leaf.dtype, leaf.ndim):
                return False
        elif not isinstance(seen, torch.SymInt | torch.SymFloat | torch.SymBool) and seen != leaf:
            return False
    for node in guards(graph):
        try:
            graph.get_submodule(str(node.target))(*(values[arg] for arg in node.all_input_nodes))
        except AssertionError:
            return False
    return True


def guards(graph: fx.GraphModule) -> list[fx.Node]:
    """Nodes that check inputs: the only modules that the graph of an exported program calls."""
    return graph.graph.find_nodes(op="call_module")
