"""The verbs `prepare` and `squash`: from a mapping to masks on a model, and to baked-in zeros."""

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from fx_sparsity.graph.compiled import guard_identity, has_backward, is_compiled, real_tensors
from fx_sparsity.graph.discovery import find_weights
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.mapping import Assignment, MappingLike, SparsityMapping
from fx_sparsity.graph.passes import InsertMasks, RemoveMasks, is_masked, mask_path
from fx_sparsity.graph.program_editor import insert_masks, remove_masks
from fx_sparsity.graph.received import Received
from fx_sparsity.graph.sources import Source, graph_source, inputs_without_data, module_source
from fx_sparsity.graph.uses import canonical_fqn
from fx_sparsity.graph.weight_map import DenseParameter, Reason, WeightMap
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.sparsifier import (
    BaseSparsifier,
    Mask,
    MaskError,
    RecordedMasks,
    SparsityRecord,
)
from fx_sparsity.sparsifier.target import check_maskable, graph_mask, mask_on

_log = logging.getLogger(__name__)
_Subject = TypeVar("_Subject", bound=nn.Module | ExportedProgram)


def prepare(
    subject: _Subject,
    sparsifier: BaseSparsifier,
    example_inputs: ExampleInputs | None = None,
    mapping: MappingLike | None = None,
    *,
    dynamic_shapes: Any = None,
    model: nn.Module | None = None,
) -> _Subject:
    """Find the weights of a model and put a mask, all ones, on those that the mapping names.

    A weight that is masked already keeps its mask, and `sparsifier` takes it over.

    Call `sparsifier.step()` afterwards, as often as wanted; `squash` ends it, `unprepare` undoes
    it. What stays dense is logged with its reason, and so are entries of the mapping that speak of
    no weight; `mapping.resolve(find_weights(...))` shows both beforehand.

    Whatever is raised, nothing was changed.

    Args:
        subject: a module or `fx.GraphModule`, masked in place: weights of modules get
            parametrizations; a GraphModule's own weights, and those that the graph of a
            `torch.compile` backend receives, get a mask buffer and a selecting node. Whatever a
            compiler makes of that graph sees every later edit of the masks.
            Or an `ExportedProgram`, which is not changed, nor the model that it came from.
        sparsifier: computes the masks; a fresh one, or one that is bound to this model. A backend
            that is called again, for another graph of the same weights, finds their masks on it.
        example_inputs: a tuple of positional, or a dict of keyword arguments. A module needs them,
            and without them only the weights of modules of known classes are found. For the graph
            of a backend: the list that the backend received with it.
        mapping: which weight gets which pattern and level. None gives every weight the
            sparsifier's own defaults; with `RecordedMasks`, it means the weights of the record.
        dynamic_shapes: as `torch.export.export` takes it.
        model: what `torch.compile` was given; only for the graph of a backend. The sparsifier is
            bound to it, and weights have the names and owners that they have there. Without it
            they are named as Dynamo noted them, and must be among `example_inputs`.

    Returns:
        `subject`; of an ExportedProgram, a masked copy. The sparsifier is bound to that copy's
        `module()`.

    Raises:
        InputError: the model rejects the inputs.
        MappingError: an unknown name, or a weight that cannot take its pattern.
        MaskError: no weight at all, or one that cannot be masked, as in a graph that AOTAutograd
            has traced a backward pass with, or where a graph's inputs are fake and no `model` is
            given.

    Examples:
        >>> model, sparsifier = nn.Linear(8, 4), fxs.WeightNormSparsifier()
        >>> model = fxs.prepare(model, sparsifier, (torch.randn(1, 8),), "2:4")
        >>> sparsifier.step()
        >>> sparsifier.get_mask("weight").sum(1).tolist()
        [4, 4, 4, 4]
    """
    planned = plan_prepare(
        subject, sparsifier, example_inputs, mapping, dynamic_shapes=dynamic_shapes, model=model
    )
    return mask_planned(subject, sparsifier, planned, example_inputs, model)


def plan_prepare(
    subject: nn.Module | ExportedProgram,
    sparsifier: BaseSparsifier,
    example_inputs: ExampleInputs | None = None,
    mapping: MappingLike | None = None,
    *,
    dynamic_shapes: Any = None,
    model: nn.Module | None = None,
) -> tuple[WeightMap, Assignment | None]:
    """The weights that `prepare` would mask, and how; arguments and errors are the same.

    Returns:
        The weights on which a mask can stand, and what the mapping comes to on them; None without
        a mapping. Nothing is changed.
    """
    unknown: list[str] = []
    if isinstance(subject, fx.GraphModule) and model is None:
        unknown = inputs_without_data(subject, example_inputs)
    if unknown:
        raise MaskError(
            f"{', '.join(unknown)}: example_inputs do not tell which tensors these inputs of "
            "the graph are; pass model=, the compiled module"
        )
    weights = find_weights(subject, example_inputs, dynamic_shapes=dynamic_shapes, model=model)
    mapping = mapping_for(sparsifier, mapping)
    assignment = None if mapping is None else mapping.resolve(weights)
    held = subject if model is None else model
    if isinstance(held, nn.Module) and not (isinstance(held, fx.GraphModule) and is_compiled(held)):
        unmasked = {} if assignment is None else assignment.dense
        weights = _without(weights, refusals(held, weights, unmasked, mapping))
        assignment = None if assignment is None else assignment.among(weights)
    elif mapping is None:
        weights = _without(weights, {s.fqn: s.lost_zeros for s in weights.sites if s.lost_zeros})
    if not weights and weights.frontend != "torch.compile":  # some graphs of a backend have none
        found = ", ".join(f"{p.fqn} ({p.text})" for p in weights.dense) or "none"
        raise MaskError(
            f"this {type(subject).__name__} has no weight to mask; parameters of two or more "
            f"dimensions: {found}. The codes of a model that is quantized already are masked by "
            "quantization.sparsify_codes"
        )
    if isinstance(sparsifier, RecordedMasks):
        for fqn in weights if assignment is None else assignment:
            sparsifier.check_shape(fqn, weights[fqn].shape)
    return weights, assignment


def mask_planned(
    subject: _Subject,
    sparsifier: BaseSparsifier,
    planned: tuple[WeightMap, Assignment | None],
    example_inputs: ExampleInputs | None = None,
    model: nn.Module | None = None,
) -> _Subject:
    """What `prepare` does with what `plan_prepare` returned; arguments and errors are the same."""
    weights, assignment = planned
    _log_dense(weights, assignment)
    return mask_weights(subject, sparsifier, weights, assignment, example_inputs, model)


def mapping_for(sparsifier: BaseSparsifier, mapping: MappingLike | None) -> SparsityMapping | None:
    """What was given; or else, of `RecordedMasks`, the weights of the record as they are there."""
    if mapping is not None:
        return SparsityMapping.of(mapping)
    if not isinstance(sparsifier, RecordedMasks):
        return None
    mapping = SparsityMapping()
    for fqn, weight in sparsifier.record.items():
        pattern, level = weight.pattern, weight.level
        if pattern is None:  # of a method that knows none
            pattern, level = "unstructured", 1 - float(weight.keep.float().mean())
        mapping.set_module_name(fqn, SparsityConfig(pattern, level))
    return mapping


def _log_dense(weights: WeightMap, assignment: Assignment | None) -> None:
    """Whatever stays dense, with its reason, and entries of a mapping that speak of no weight."""
    if assignment is not None:
        for fqn, reason in assignment.dense.items():
            _log.info("%s stays dense: %s", fqn, reason)
        for entry in assignment.unmatched:
            _log.warning("no weight matches %s of the mapping", entry)
    for parameter in weights.dense:
        settled = parameter.reason.explained and parameter.reason is not Reason.UNMASKABLE
        level = logging.INFO if settled else logging.WARNING
        _log.log(level, "%s stays dense: %s", parameter.fqn, parameter.text)


def refusals(
    model: nn.Module,
    weights: WeightMap,
    unmasked: Container[str] = (),
    mapping: SparsityMapping | None = None,
) -> dict[str, str]:
    """FQN -> the reason why a weight is not to be masked, such as another parametrization of it.

    Args:
        model: that holds the weights.
        weights: of the model.
        unmasked: FQNs of weights that are to stay dense anyway.
        mapping: names weights; those that it names must take a mask.

    Raises:
        MaskError: a weight that the mapping names cannot.
    """
    found = {}
    for site in weights.sites:
        owner, attribute = _owner(model, site.fqn)
        if site.fqn in unmasked or mask_on(owner, attribute) is not None:
            continue
        if site.lost_zeros and (mapping is None or not mapping.names(site)):
            found[site.fqn] = site.lost_zeros
            continue
        try:
            check_maskable(site.fqn, owner, attribute)
        except MaskError as error:
            if mapping is not None and mapping.names(site):
                raise
            found[site.fqn] = str(error)
    return found


def _without(weights: WeightMap, reasons: Mapping[str, str]) -> WeightMap:
    """A map in which weights that cannot be masked are among what stays dense."""
    sites = tuple(site for site in weights.sites if site.fqn not in reasons)
    dense = tuple(
        DenseParameter(site.fqn, site.shape, Reason.ZEROS, site.lost_zeros.partition(": ")[2])
        if reasons[site.fqn] == site.lost_zeros
        else DenseParameter(site.fqn, site.shape, Reason.UNMASKABLE, reasons[site.fqn])
        for site in weights.sites
        if site.fqn in reasons
    )
    return replace(weights, sites=sites, dense=(*weights.dense, *dense))


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


def squash(model: _Subject, sparsifier: BaseSparsifier) -> tuple[_Subject, SparsityRecord]:
    """Bake every mask into its weight, and take the masks off.

    Args:
        model: what `prepare` returned; changed in place. Of an ExportedProgram the weights are
            written in place, too, and the graph without masks is a new one. The graph of a backend
            shares its weights with the model that was compiled, which may be given instead; what
            was compiled from the graph selects as before, until it is compiled anew.
        sparsifier: the one that prepared it.

    Returns:
        The plain model, and the record of its masks that `verify` reads later.

    Raises:
        MaskError: the sparsifier holds no mask on this model; nothing was changed.

    Examples:
        >>> model, sparsifier = nn.Linear(8, 4), fxs.WeightNormSparsifier()
        >>> model = fxs.prepare(model, sparsifier, (torch.randn(1, 8),), "2:4")
        >>> sparsifier.step()
        >>> model, record = fxs.squash(model, sparsifier)
        >>> record["weight"].pattern, int((model.weight == 0).sum())
        ('2:4', 16)
    """
    check_bound(model, sparsifier)
    record = SparsityRecord.of(sparsifier)
    sparsifier.squash_mask()
    return _without_masks(model), record


def unprepare(model: _Subject, sparsifier: BaseSparsifier) -> _Subject:
    """Undo `prepare`: the weights as they are beneath the masks, bit for bit, and no masks.

    Args:
        model: what `prepare` returned; changed in place, or copied, as `squash` does. What was
            compiled from the graph of a backend keeps everything from now on.
        sparsifier: the one that prepared it. It is fresh again afterwards.

    Returns:
        The plain model.

    Raises:
        MaskError: the sparsifier holds no mask on this model, or has squashed it; nothing was
            changed.

    Examples:
        >>> model, sparsifier = nn.Linear(8, 4), fxs.WeightNormSparsifier()
        >>> model = fxs.prepare(model, sparsifier, (torch.randn(1, 8),), "2:4")
        >>> sparsifier.step()
        >>> model = fxs.unprepare(model, sparsifier)
        >>> sparsifier.names, int((model.weight == 0).sum())
        ([], 0)
    """
    check_bound(model, sparsifier)
    sparsifier.remove_masks()
    return _without_masks(model)


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
        owner, attribute = _owner(holder, fqn)
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
        owner, attribute = _owner(model, fqn)
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
            owner, attribute = _owner(gm, alias)
            setattr(owner, attribute, gm.get_parameter(fqn))
    _prepare_graph(gm, sparsifier, weights, entries, module_source(gm), None)
    return masked


def _without_masks(model: _Subject) -> _Subject:
    if isinstance(model, ExportedProgram):
        return remove_masks(model)  # type: ignore[return-value]
    if isinstance(model, fx.GraphModule):
        RemoveMasks()(model)
    return model


def check_bound(model: nn.Module | ExportedProgram, sparsifier: BaseSparsifier) -> None:
    """Raise `MaskError` unless the model holds every tensor of the sparsifier, or its mask."""
    if isinstance(model, ExportedProgram):
        tensors = [*model.state_dict.values(), *model.constants.values()]
    else:
        tensors = [*model.parameters(), *model.buffers()]
    held = {id(tensor) for tensor in tensors}
    foreign = [
        name
        for name in sparsifier.names
        if held.isdisjoint({id(sparsifier.get_tensor(name)), id(sparsifier.get_mask(name))})
    ]
    if foreign or (not sparsifier.names and sparsifier.model is None):
        raise MaskError(
            f"the sparsifier has not prepared this {type(model).__name__} "
            f"({', '.join(foreign) or 'it has prepared none'}); "
            "give the model that `prepare` returned"
        )


def _owner(model: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    path, _, attribute = fqn.rpartition(".")
    return model.get_submodule(path), attribute


def _owned(model: nn.Module, fqn: str) -> Tensor:
    """A weight, or what lies beneath its mask."""
    owner, attribute = _owner(model, fqn)
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
