"""Masks on what a mapping came to: of modules, of graphs by nodes, and of programs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from fx_sparsity.graph.compiled import guard_identity, has_backward, is_compiled, real_tensors
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.passes import InsertMasks, is_masked, mask_path
from fx_sparsity.graph.prepare_plan import owner_of
from fx_sparsity.graph.program_editor import insert_masks
from fx_sparsity.graph.received import Received
from fx_sparsity.graph.sources import Source, graph_source, module_source
from fx_sparsity.graph.uses import canonical_fqn
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.sparsifier import BaseSparsifier, Mask, MaskError
from fx_sparsity.sparsifier.target import check_maskable, graph_mask, mask_on

_Subject = TypeVar("_Subject", bound=nn.Module | ExportedProgram)


def mask_weights(
    subject: _Subject,
    sparsifier: BaseSparsifier,
    weights: WeightMap,
    configs: Mapping[str, SparsityConfig] | None = None,
    example_inputs: ExampleInputs | None = None,
    model: nn.Module | None = None,
) -> _Subject:
    """What `prepare` does once the weights are found and the mapping is resolved.

    Args:
        subject: as `prepare` takes it.
        sparsifier: as `prepare` takes it.
        weights: by their names in this model.
        configs: FQN -> configuration of those to mask. None gives every weight the sparsifier's own
            defaults.
        example_inputs: as `prepare` takes them, for the graph of a backend.
        model: as `prepare` takes it, for the graph of a backend.

    Raises:
        MaskError: as `prepare`; nothing was changed.
    """
    entries: dict[str, dict[str, Any]] = {fqn: {} for fqn in weights}
    if configs is not None:
        entries = {fqn: group_entry(config) for fqn, config in configs.items()}
    if isinstance(subject, ExportedProgram):
        return _prepare_program(subject, sparsifier, weights, entries)  # type: ignore[return-value]
    if isinstance(subject, fx.GraphModule):
        source = graph_source(subject, example_inputs, model)
        with real_tensors():
            _prepare_graph(subject, sparsifier, weights, entries, source, model)
    else:
        sparsifier.prepare(subject, _config(subject, weights, entries))
    return subject


def mask_one_by_one(
    model: nn.Module,
    sparsifier: BaseSparsifier,
    weights: WeightMap,
    configs: Mapping[str, SparsityConfig],
) -> Callable[[str], object]:
    """What `mask_weights` does, weight by weight, though a module is looked through but once.

    Args:
        model: not changed yet; to be changed by masks alone until the last one is on.
        sparsifier: as `prepare` takes it.
        weights: of the model.
        configs: FQN -> configuration of each weight that may be masked.

    Returns:
        Puts a mask on the weight of that FQN.

    Raises:
        MaskError: as `prepare`.
    """
    if isinstance(model, fx.GraphModule):
        return lambda fqn: mask_weights(model, sparsifier, weights, {fqn: configs[fqn]})
    entries = {fqn: group_entry(config) for fqn, config in configs.items()}
    planned = sparsifier.plan_masks(model, _config(model, weights, entries))
    return lambda fqn: sparsifier.place_masks(model, [planned[fqn]])


def group_entry(config: SparsityConfig) -> dict[str, Any]:
    """A configuration in the words of a sparsifier's group."""
    return {"pattern": str(config.pattern), "sparsity_level": config.level}


def _prepare_graph(
    gm: fx.GraphModule,
    sparsifier: BaseSparsifier,
    weights: WeightMap,
    entries: dict[str, dict[str, Any]],
    source: Source,
    model: nn.Module | None,
) -> None:
    """Mask a GraphModule's own weights by nodes, those of the modules that it calls as modules."""
    read = _read_by_graph(gm, source, weights, list(entries))
    holder: nn.Module = gm
    if is_compiled(gm):
        _check_compiled(gm, entries, read)
        holder = _received(sparsifier, read, source) if model is None else model
    masked = [name for name in sparsifier.names if not sparsifier.is_squashed(name)]
    bound = sparsifier.model is not None
    live = {id(sparsifier.get_tensor(name)): name for name in masked} if bound else {}
    new: dict[str, Mask] = {}
    for fqn, nodes in read.items():
        owner, attribute = owner_of(holder, fqn)
        if parametrize.is_parametrized(owner, attribute):
            continue
        tensor = check_maskable(fqn, owner, attribute)
        names = dict.fromkeys(source(node)[0] for node in nodes)  # type: ignore[index]
        if any(map(is_masked, nodes)):
            mask = next(found for name in names if (found := graph_mask(gm, name)))
        else:
            ones = torch.ones_like(tensor, dtype=torch.bool)
            known = live.get(id(tensor))
            mask = Mask(ones if known is None else sparsifier.get_mask(known))
            new |= dict.fromkeys(names, mask)
        entries[fqn]["mask_module"] = mask
    sparsifier.prepare(holder, _config(holder, weights, entries))
    if is_compiled(gm):
        guard_identity(_owned(holder, fqn) for fqn in read)
    InsertMasks(new, source)(gm)


def _config(
    model: nn.Module, weights: WeightMap, entries: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """What a sparsifier's `prepare` takes; weights without a mask get one of ones."""
    config = []
    for fqn, entry in entries.items():
        owner, attribute = owner_of(model, fqn)
        if "mask_module" not in entry and mask_on(owner, attribute) is None:
            tensor = check_maskable(fqn, owner, attribute)
            entry["mask"] = torch.ones_like(tensor, dtype=torch.bool)
        site = weights[fqn]
        lost = {"lost_zeros": site.lost_zeros} if site.lost_zeros else {}
        config.append({"tensor_fqn": fqn, "roles": site.roles, **lost, **entry})
    return config


def _prepare_program(
    program: ExportedProgram,
    sparsifier: BaseSparsifier,
    weights: WeightMap,
    entries: dict[str, dict[str, Any]],
) -> ExportedProgram:
    """Mask a copy of a program, and bind the sparsifier to the module that shares its tensors."""
    held = {**program.state_dict, **program.constants}
    masks: dict[str, Mask] = {}
    for fqn in entries:
        if f"{mask_path(fqn)}.mask" not in held:
            mask = Mask(torch.ones_like(held[fqn], dtype=torch.bool))
            masks |= dict.fromkeys((fqn, *weights[fqn].aliases), mask)
    masked = insert_masks(program, masks) if masks else program
    gm = masked.module()
    for fqn in entries:  # loading has made several tensors of a tied one
        for alias in weights[fqn].aliases:
            owner, attribute = owner_of(gm, alias)
            setattr(owner, attribute, gm.get_parameter(fqn))
    _prepare_graph(gm, sparsifier, weights, entries, module_source(gm), None)
    return masked


def _owned(model: nn.Module, fqn: str) -> Tensor:
    """A weight, or what lies beneath its mask."""
    owner, attribute = owner_of(model, fqn)
    if parametrize.is_parametrized(owner, attribute):
        entry: Any = owner.parametrizations
        return entry[attribute].original
    return getattr(owner, attribute)


def _read_by_graph(
    gm: fx.GraphModule, source: Source, weights: WeightMap, fqns: list[str]
) -> dict[str, list[fx.Node]]:
    """FQN -> nodes that stand for a weight in the graph; the others belong to called modules."""
    nodes: dict[str, list[fx.Node]] = {}
    called: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            held = module.named_parameters(prefix=str(node.target), remove_duplicate=False)
            called.update(canonical_fqn(name) for name, _ in held)
        elif (found := source(node)) is not None:
            nodes.setdefault(canonical_fqn(found[0]), []).append(node)
    read = {}
    for fqn in fqns:
        names = {fqn, *weights[fqn].aliases}
        if names.isdisjoint(nodes):
            continue
        if names & called:
            raise MaskError(
                f"{fqn} is read by the graph itself and by a module that it calls "
                f"({', '.join(sorted(names & called))}); open that module up before masking"
            )
        read[fqn] = [node for name in (fqn, *weights[fqn].aliases) for node in nodes.get(name, ())]
    return read


def _check_compiled(
    gm: fx.GraphModule, fqns: Iterable[str], read: Mapping[str, list[fx.Node]]
) -> None:
    """Raise `MaskError` unless a backend's graph can be masked by nodes alone."""
    if has_backward(gm):
        raise MaskError(
            f"{', '.join(fqns) or 'this graph'}: a backward pass is traced already, which would "
            "move masked values; prepare the graph that Dynamo hands to the backend, "
            "before AOTAutograd"
        )
    if unread := [fqn for fqn in fqns if fqn not in read]:
        raise MaskError(
            f"{unread[0]} is held by a module that the graph calls; prepare that module"
        )


def _received(
    sparsifier: BaseSparsifier, read: Mapping[str, list[fx.Node]], source: Source
) -> Received:
    """A module over the tensors that a backend received, the same one for all of its graphs."""
    holder = sparsifier.model if isinstance(sparsifier.model, Received) else Received()
    held, new = holder.held(), {}
    for fqn, nodes in read.items():
        name, tensor = source(nodes[0])  # type: ignore[misc]
        if name != fqn:
            raise MaskError(
                f"{fqn} is parametrized in the compiled module; pass model=, or prepare that module"
            )
        if held.get(fqn, tensor) is not tensor:
            raise MaskError(
                f"{fqn} is the name of two weights, in two graphs; pass model=, the compiled module"
            )
        new[fqn] = tensor
    holder.hold(new)
    return holder
