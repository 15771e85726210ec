"""The verbs `prepare` and `squash`: from a wish to masks on a model, and to baked-in zeros."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.capture import ExampleInputs
from fx_sparsity.graph.discovery import find_weights
from fx_sparsity.graph.exported import insert_masks, remove_masks
from fx_sparsity.graph.mapping import SparsityMapping
from fx_sparsity.graph.passes import InsertMasks, RemoveMasks, mask_path
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.sparsifier import BaseSparsifier, Mask, MaskError, SparsityRecord
from fx_sparsity.sparsifier.target import check_maskable, graph_mask, mask_on

_log = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module | ExportedProgram)


def prepare(
    model: _Model,
    sparsifier: BaseSparsifier,
    example_inputs: ExampleInputs | None = None,
    mapping: SparsityMapping | None = None,
    *,
    dynamic_shapes: Any = None,
) -> _Model:
    """Find the weights of a model and put a mask, all ones, on those that the mapping names.

    A weight that is masked already keeps its mask, and `sparsifier` takes it over.

    Call `sparsifier.step()` afterwards, as often as wanted; `squash` ends it, `unprepare` undoes
    it. What stays dense is logged with its reason, and `mapping.resolve(find_weights(...))` shows
    it beforehand.

    Args:
        model: a module or `fx.GraphModule`, masked in place: weights of modules get
            parametrizations; a GraphModule's own weights get a mask buffer and a selecting node.
            Or an `ExportedProgram`, which is not changed, nor the model that it came from.
        sparsifier: computes the masks; a fresh one, or one that is bound to this model.
        example_inputs: a tuple of positional, or a dict of keyword arguments. Only a module needs
            them, and without them only the weights of modules of known classes are found.
        mapping: which weight gets which pattern and level. None gives every weight the
            sparsifier's own defaults.
        dynamic_shapes: as `torch.export.export` takes it.

    Returns:
        `model`; of an ExportedProgram, a masked copy. The sparsifier is bound to that copy's
        `module()`.

    Raises:
        InputError: the model rejects the inputs.
        MappingError: an unknown name, or a weight that cannot take its pattern.
        MaskError: a weight that cannot be masked.

        Whatever is raised, nothing was changed.
    """
    weights = find_weights(model, example_inputs, dynamic_shapes=dynamic_shapes)
    assignment = None if mapping is None else mapping.resolve(weights)
    for fqn, why in assignment.dense.items() if assignment else ():
        _log.info("%s stays dense: %s", fqn, why)
    for unclaimed in weights.unclaimed:
        level = logging.INFO if unclaimed.reason.explained else logging.WARNING
        _log.log(level, "%s stays dense: %s %s", unclaimed.fqn, unclaimed.reason, unclaimed.detail)
    return mask_weights(model, sparsifier, weights, assignment)


def mask_weights(
    model: _Model,
    sparsifier: BaseSparsifier,
    weights: WeightMap,
    configs: Mapping[str, SparsityConfig] | None = None,
) -> _Model:
    """What `prepare` does once the weights are found and the mapping is resolved.

    Args:
        model: as `prepare` takes it.
        sparsifier: as `prepare` takes it.
        weights: by their names in this model.
        configs: FQN -> configuration of those to mask. None gives every weight the sparsifier's own
            defaults.

    Raises:
        MaskError: as `prepare`; nothing was changed.
    """
    entries: dict[str, dict[str, Any]] = {fqn: {} for fqn in weights}
    if configs is not None:
        entries = {fqn: group_entry(config) for fqn, config in configs.items()}
    if isinstance(model, ExportedProgram):
        return _prepare_program(model, sparsifier, weights, entries)  # type: ignore[return-value]
    new = _prepare_module(model, sparsifier, weights, entries)
    if isinstance(model, fx.GraphModule):
        InsertMasks(new)(model)
    return model


def squash(model: _Model, sparsifier: BaseSparsifier) -> tuple[_Model, SparsityRecord]:
    """Bake every mask into its weight, and take the masks off.

    Args:
        model: what `prepare` returned; changed in place. Of an ExportedProgram the weights are
            written in place, too, and the graph without masks is a new one.
        sparsifier: the one that prepared it.

    Returns:
        The plain model, and the record of its masks that `verify` reads later.

    Raises:
        MaskError: the sparsifier holds no mask on this model; nothing was changed.
    """
    _check_bound(model, sparsifier)
    record = SparsityRecord.of(sparsifier)
    sparsifier.squash_mask()
    return _without_masks(model), record


def unprepare(model: _Model, sparsifier: BaseSparsifier) -> _Model:
    """Undo `prepare`: the weights as they are beneath the masks, bit for bit, and no masks.

    Args:
        model: what `prepare` returned; changed in place, or copied, as `squash` does.
        sparsifier: the one that prepared it. It is fresh again afterwards.

    Returns:
        The plain model.

    Raises:
        MaskError: the sparsifier holds no mask on this model, or has squashed it; nothing was
            changed.
    """
    _check_bound(model, sparsifier)
    sparsifier.remove_masks()
    return _without_masks(model)


def group_entry(config: SparsityConfig) -> dict[str, Any]:
    """A configuration in the words of a sparsifier's group."""
    return {"pattern": str(config.pattern), "sparsity_level": config.level}


def _prepare_module(
    model: nn.Module,
    sparsifier: BaseSparsifier,
    weights: WeightMap,
    entries: dict[str, dict[str, Any]],
) -> dict[str, Mask]:
    """Bind the sparsifier to a model. Returns the masks that its graph has to apply yet."""
    in_graph = _graph_weights(model, weights, list(entries))
    new: dict[str, Mask] = {}
    config = []
    for fqn, entry in entries.items():
        site = weights[fqn]
        owner, attribute = _owner(model, fqn), fqn.rpartition(".")[2]
        if fqn in in_graph:
            mask = graph_mask(model, fqn)
            if mask is None:
                mask = Mask(_ones(fqn, owner, attribute))
                new |= dict.fromkeys((fqn, *site.aliases), mask)
            entry["mask_module"] = mask
        elif mask_on(owner, attribute) is None:
            entry["mask"] = _ones(fqn, owner, attribute)
        config.append({"tensor_fqn": fqn, "roles": site.roles, **entry})
    sparsifier.prepare(model, config)
    return new


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
    _prepare_module(masked.module(), sparsifier, weights, entries)
    return masked


def _without_masks(model: _Model) -> _Model:
    if isinstance(model, ExportedProgram):
        return remove_masks(model)  # type: ignore[return-value]
    if isinstance(model, fx.GraphModule):
        RemoveMasks()(model)
    return model


def _check_bound(model: nn.Module | ExportedProgram, sparsifier: BaseSparsifier) -> None:
    """Raise `MaskError` unless every tensor of the sparsifier is one of the model's."""
    if isinstance(model, ExportedProgram):
        tensors = [*model.state_dict.values(), *model.constants.values()]
    else:
        tensors = [*model.parameters(), *model.buffers()]
    held = {id(tensor) for tensor in tensors}
    foreign = [n for n in sparsifier.names if id(sparsifier.get_tensor(n)) not in held]
    if foreign or not sparsifier.names:
        raise MaskError(
            f"the sparsifier has not prepared this {type(model).__name__} "
            f"({', '.join(foreign) or 'it has prepared none'}); "
            "give the model that `prepare` returned"
        )


def _owner(model: nn.Module, fqn: str) -> nn.Module:
    """The module that holds a weight; a backend's graph receives its weights as inputs instead."""
    try:
        return model.get_submodule(fqn.rpartition(".")[0])
    except AttributeError as error:
        raise MaskError(
            f"{fqn} is not held by this {type(model).__name__}, which receives it as an input; "
            "prepare the module that was compiled"
        ) from error


def _ones(fqn: str, owner: nn.Module, attribute: str) -> Tensor:
    return torch.ones_like(check_maskable(fqn, owner, attribute), dtype=torch.bool)


def _graph_weights(model: nn.Module, weights: WeightMap, fqns: list[str]) -> set[str]:
    """Weights that `get_attr` nodes of a GraphModule read; the others belong to modules."""
    if not isinstance(model, fx.GraphModule):
        return set()
    read = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    in_graph = set()
    for fqn in fqns:
        names = {fqn, *weights[fqn].aliases}
        if names <= read or (fqn in read and len(names) == 1):
            in_graph.add(fqn)
        elif names & read:
            raise MaskError(
                f"{fqn} is read by the graph itself and by a module that it calls "
                f"({', '.join(sorted(names - read))}); open that module up before masking"
            )
    return in_graph
