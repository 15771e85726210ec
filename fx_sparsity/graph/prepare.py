"""The verbs `prepare` and `squash`: from a mapping to masks on a model, and to baked-in zeros."""

import logging
from typing import Any, TypeVar

from torch import fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.mapping import Assignment, MappingLike
from fx_sparsity.graph.passes import RemoveMasks
from fx_sparsity.graph.prepare_plan import plan_prepare
from fx_sparsity.graph.program_editor import remove_masks
from fx_sparsity.graph.put_masks import mask_weights
from fx_sparsity.graph.weight_map import Reason, WeightMap
from fx_sparsity.sparsifier import BaseSparsifier, MaskError, SparsityRecord

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
