"""What `prepare` would mask, and how: everything that is checked before anything is changed."""

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from fx_sparsity.graph.compiled import is_compiled
from fx_sparsity.graph.discovery import find_weights
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.mapping import Assignment, MappingLike, SparsityMapping
from fx_sparsity.graph.sources import inputs_without_data
from fx_sparsity.graph.weight_map import DenseParameter, Reason, WeightMap
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.sparsifier import BaseSparsifier, MaskError, RecordedMasks
from fx_sparsity.sparsifier.target import check_maskable, mask_on


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
        owner, attribute = owner_of(model, site.fqn)
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


def owner_of(model: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the attribute."""
    path, _, attribute = fqn.rpartition(".")
    return model.get_submodule(path), attribute
