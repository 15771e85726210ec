"""`find_weights`: every weight of a model, read off its graph."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.capture import (
    ExampleInputs,
    InputError,
    Source,
    export_model,
    exported_source,
    module_source,
)
from fx_sparsity.graph.operators import (
    ADDITIONS,
    MODULES,
    NORMALIZATIONS,
    OPERATORS,
    bind,
    operator_name,
)
from fx_sparsity.graph.provenance import (
    Origin,
    follow,
    origin_of,
    roles_of_parameter,
    slice_of_parameter,
)
from fx_sparsity.graph.weight_map import Reason, Unclaimed, Use, WeightMap, WeightSite

Model = nn.Module | fx.GraphModule | ExportedProgram


def find_weights(
    model: Model,
    example_inputs: ExampleInputs | None = None,
    *,
    dynamic_shapes: Any = None,
) -> WeightMap:
    """Find every weight that a linear, embedding, convolution or matmul-like operator consumes.

    Args:
        model: a module (captured with `torch.export`), an `fx.GraphModule` or an
            `ExportedProgram` (read as they are). Not changed.
        example_inputs: a tuple of positional, or a dict of keyword arguments; needed for a module.
        dynamic_shapes: as `torch.export.export` takes it; only for a module.

    Returns:
        The sites in graph order, and every parameter of two or more dimensions that is none.

    Raises:
        InputError: a module without `example_inputs`, or one that rejects them.
        CaptureError: the module runs but cannot be exported.
    """
    if isinstance(model, ExportedProgram):
        return _read(model.graph, exported_source(model), model, "ExportedProgram")
    if isinstance(model, fx.GraphModule):
        return _read(model.graph, module_source(model), model, "GraphModule")
    if example_inputs is None:
        raise InputError(
            f"example_inputs: {type(model).__name__} is a plain module and has to be captured; "
            "give a tuple of positional or a dict of keyword arguments"
        )
    program = export_model(model, example_inputs, dynamic_shapes)
    return _read(program.graph, exported_source(program), model, "torch.export")


def weight_uses(graph: fx.Graph, source: Source) -> Iterator[tuple[fx.Node, str, Origin, Any]]:
    """Every use of a tensor that `source` knows.

    Yields:
        (consuming node, argument name, origin, axes); name and axes are None where the operator
        has no row in the table.
    """
    live = _live_nodes(graph)
    origins: dict[fx.Node, Origin] = {}
    for node in graph.nodes:
        if node not in live:
            continue
        if (found := source(node)) is not None:
            origins[node] = origin_of(*found)
            continue
        if (origin := follow(node, origins)) is not None:
            origins[node] = origin
            continue
        if node.op not in ("call_function", "call_method"):
            continue
        claimed: set[fx.Node] = set()
        row = OPERATORS.get(operator_name(node))
        for arg, value, axes in row.find(bind(node)) if row else ():
            if isinstance(value, fx.Node) and value in origins and value not in claimed:
                claimed.add(value)
                yield node, arg, origins[value], axes
        for value in node.all_input_nodes:
            if value in origins and value not in claimed:
                yield node, "", origins[value], None


def _read(graph: fx.Graph, source: Source, model: Any, frontend: str) -> WeightMap:
    tensors, aliases, parameters = _named_tensors(model)
    uses: dict[str, list[tuple[str, Use]]] = {}
    rejected: dict[str, set[str]] = {}
    for node, arg, origin, axes in weight_uses(graph, source):
        fqn = aliases.get(origin.fqn, origin.fqn)
        if origin.parameter.ndim < 2 or not (fqn in parameters or origin.dequantized):
            continue
        name = operator_name(node)
        roles = None if axes is None else roles_of_parameter(origin, axes)
        if roles is None:
            rejected.setdefault(fqn, set()).add(name)
            continue
        use = Use(name, node.name, arg, roles, slice_of_parameter(origin))
        uses.setdefault(fqn, []).append((OPERATORS[name].kind, use))
    for fqn, kind, use in _module_uses(graph, model):
        uses.setdefault(aliases.get(fqn, fqn), []).append((kind, use))

    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    sites = []
    for fqn, found in uses.items():
        owner = fqn.rpartition(".")[0]
        holder = type(modules[owner]) if owner in modules else None
        tensor = tensors[fqn]
        sites.append(
            WeightSite(
                fqn=canonical_fqn(fqn),
                aliases=tuple(
                    canonical_fqn(a) for a, c in aliases.items() if c == fqn and a != fqn
                ),
                owner=canonical_fqn(fqn).rpartition(".")[0],
                owner_type=f"{holder.__module__}.{holder.__qualname__}" if holder else "",
                kind=found[0][0],
                roles=found[0][1].roles,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                uses=tuple(use for _, use in found),
            )
        )
    hidden = _inside_leaves(graph, model)
    canonical = {fqn for fqn in parameters if aliases[fqn] == fqn}
    unclaimed = tuple(
        _explain(canonical_fqn(fqn), tensors[fqn], rejected.get(fqn, set()), hidden.get(fqn))
        for fqn in tensors
        if fqn in canonical and fqn not in uses and tensors[fqn].ndim >= 2
    )
    vectors = sum(tensors[fqn].ndim < 2 for fqn in canonical)
    return WeightMap(tuple(sites), unclaimed, vectors, frontend)


def _named_tensors(model: Any) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """Tensors by FQN, FQN -> canonical FQN of the same tensor, and which are parameters."""
    if isinstance(model, ExportedProgram):
        tensors = {**model.state_dict, **model.constants}
        parameters = set(model.graph_signature.parameters)
    else:
        named = dict(model.named_parameters(remove_duplicate=False))
        tensors = {**named, **dict(model.named_buffers(remove_duplicate=False))}
        parameters = set(named)
    first: dict[int, str] = {}
    aliases = {fqn: first.setdefault(id(tensor), fqn) for fqn, tensor in tensors.items()}
    return tensors, aliases, parameters


def _module_uses(graph: fx.Graph, model: Any) -> Iterator[tuple[str, str, Use]]:
    """Weights of modules that the graph calls as a whole."""
    live = _live_nodes(graph)
    for node in graph.nodes:
        if node.op != "call_module" or node not in live:
            continue
        module = model.get_submodule(node.target)
        for base, (kind, weights) in MODULES.items():
            if not isinstance(module, base):
                continue
            for attribute, axes in weights.items():
                fqn = f"{node.target}.{attribute}"
                masked = f"{node.target}.parametrizations.{attribute}.original"
                tensor = getattr(module, attribute)
                held = fqn if attribute in module._parameters else masked
                roles = roles_of_parameter(origin_of(fqn, tensor), axes)
                assert roles is not None  # the tensor itself, not a view
                yield held, kind, Use(kind, node.name, attribute, roles)
            break


def _live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an output depends on."""
    live: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += node.all_input_nodes
    return live


def canonical_fqn(fqn: str) -> str:
    """The name that a tensor has without its parametrization."""
    head, marker, tail = fqn.rpartition("parametrizations.")
    return head + tail.removesuffix(".original") if marker and tail.endswith(".original") else fqn


def _inside_leaves(graph: fx.Graph, model: Any) -> dict[str, str]:
    """FQN -> class of the called module, for parameters of modules that the graph does not open."""
    return {
        f"{node.target}.{name}": type(model.get_submodule(node.target)).__name__
        for node in graph.nodes
        if node.op == "call_module"
        for name, _ in model.get_submodule(node.target).named_parameters()
    }


def _explain(fqn: str, tensor: Tensor, consumers: set[str], leaf: str | None) -> Unclaimed:
    shape = tuple(tensor.shape)
    detail = ", ".join(sorted(consumers))
    if leaf is not None:
        return Unclaimed(fqn, shape, Reason.FRONTEND, f"inside {leaf}")
    if not tensor.is_floating_point():
        return Unclaimed(fqn, shape, Reason.NOT_FLOATING, str(tensor.dtype))
    if not consumers:
        return Unclaimed(fqn, shape, Reason.UNREACHABLE)
    if consumers <= ADDITIONS:
        return Unclaimed(fqn, shape, Reason.ADDED)
    if consumers <= NORMALIZATIONS:
        return Unclaimed(fqn, shape, Reason.SCALE)
    return Unclaimed(fqn, shape, Reason.OPERATOR, detail)
