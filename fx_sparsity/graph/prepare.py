"""The verbs `prepare` and `squash`: from a wish to masks on a model, and to baked-in zeros."""

import logging
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.capture import ExampleInputs
from fx_sparsity.graph.discovery import find_weights
from fx_sparsity.graph.mapping import SparsityMapping
from fx_sparsity.graph.passes import InsertMasks, RemoveMasks, graph_mask
from fx_sparsity.graph.weight_map import WeightMap
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.sparsifier import BaseSparsifier, Mask, MaskError, SparsityRecord
from fx_sparsity.sparsifier.target import check_maskable, mask_on

_log = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)


def prepare(
    model: _Module,
    sparsifier: BaseSparsifier,
    example_inputs: ExampleInputs | None = None,
    mapping: SparsityMapping | None = None,
    *,
    dynamic_shapes: Any = None,
) -> _Module:
    """Find the weights of a model and put a mask, all ones, on those that the mapping names.

    A weight that is masked already keeps its mask, and `sparsifier` takes it over.

    Call `sparsifier.step()` afterwards, as often as wanted; `squash` ends it. What stays dense is
    logged with its reason, and `mapping.resolve(find_weights(...))` shows it beforehand.

    Args:
        model: a module or `fx.GraphModule`; masked in place. Weights of modules get
            parametrizations; a GraphModule's own weights get a mask buffer and a selecting node.
        sparsifier: computes the masks; a fresh one, or one that is bound to this model.
        example_inputs: a tuple of positional, or a dict of keyword arguments. Not needed for a
            GraphModule.
        mapping: which weight gets which pattern and level. None gives every weight the
            sparsifier's own defaults.
        dynamic_shapes: as `torch.export.export` takes it.

    Returns:
        `model`.

    Raises:
        InputError, CaptureError: the model rejects the inputs, or cannot be captured.
        MappingError: an unknown name, or a weight that cannot take its pattern.
        MaskError: a weight that cannot be masked.
        TypeError: `model` is an ExportedProgram.

        Whatever is raised, nothing was changed.
    """
    if isinstance(model, ExportedProgram):
        raise TypeError("model: expected a module, found an ExportedProgram; pass program.module()")
    weights = find_weights(model, example_inputs, dynamic_shapes=dynamic_shapes)
    entries: dict[str, dict[str, Any]] = {fqn: {} for fqn in weights}
    if mapping is not None:
        assignment = mapping.resolve(weights)
        entries = {fqn: group_entry(config) for fqn, config in assignment.items()}
        for fqn, why in assignment.dense.items():
            _log.info("%s stays dense: %s", fqn, why)
    for unclaimed in weights.unclaimed:
        level = logging.INFO if unclaimed.reason.explained else logging.WARNING
        _log.log(level, "%s stays dense: %s %s", unclaimed.fqn, unclaimed.reason, unclaimed.detail)
    in_graph = _graph_weights(model, weights, list(entries))
    new: dict[str, Mask] = {}
    config = []
    for fqn, entry in entries.items():
        site = weights[fqn]
        owner, attribute = model.get_submodule(site.owner), fqn.rpartition(".")[2]
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
    if isinstance(model, fx.GraphModule):
        InsertMasks(new)(model)
    return model


def squash(model: _Module, sparsifier: BaseSparsifier) -> tuple[_Module, SparsityRecord]:
    """Bake every mask into its weight, in place, and take the masks off.

    Args:
        model: what `prepare` returned.
        sparsifier: the one that prepared it.

    Returns:
        The plain model, and the record of its masks that `verify` reads later.

    Raises:
        MaskError: the sparsifier holds no mask on this model; nothing was changed.
    """
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    foreign = [n for n in sparsifier.names if id(sparsifier.get_tensor(n)) not in held]
    if foreign or not sparsifier.names:
        raise MaskError(
            f"the sparsifier has not prepared this {type(model).__name__} "
            f"({', '.join(foreign) or 'it has prepared none'}); "
            "squash the model that `prepare` returned"
        )
    record = SparsityRecord.of(sparsifier)
    sparsifier.squash_mask()
    if isinstance(model, fx.GraphModule):
        RemoveMasks()(model)
    return model, record


def group_entry(config: SparsityConfig) -> dict[str, Any]:
    """A configuration in the words of a sparsifier's group."""
    return {"pattern": str(config.pattern), "sparsity_level": config.level}


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
