"""What is to be done with each weight, decided before anything is changed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, fx, nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.calls import bind, writes
from fx_sparsity.graph.mapping import SparsityMapping
from fx_sparsity.graph.operators import OPERATORS, groups_of, groups_of_owner, shows_inputs
from fx_sparsity.graph.prepare_plan import refusals
from fx_sparsity.graph.put_masks import group_entry
from fx_sparsity.graph.sources import named_tensors
from fx_sparsity.graph.uses import canonical_fqn
from fx_sparsity.graph.weight_map import Use, WeightSite
from fx_sparsity.masks import contains_nan
from fx_sparsity.patterns import PatternError, Role, SparsityConfig
from fx_sparsity.pruning.batches import Frame, GraphUse
from fx_sparsity.pruning.matrix_form import MatrixForm
from fx_sparsity.pruning.methods import CalibratedSparsifier
from fx_sparsity.sparsifier.target import MaskError, check_maskable, check_memory, mask_on

_log = logging.getLogger(__name__)
_TABLE: frozenset[Role] = frozenset({"row", "dim"})


class Unreachable(FxSparsityError, ValueError):
    """The inputs of a weight cannot be known; the message is the reason."""


@dataclass(frozen=True)
class Plan:
    """How one weight is pruned.

    Attributes:
        fqn: of the weight.
        config: pattern and level that it gets.
        form: its matrix form.
        roles: of its axes, in the uses that count.
        notes: what a user should know beforehand.
    """

    fqn: str
    config: SparsityConfig
    form: MatrixForm
    roles: tuple[Role, ...]
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> bool:
        """Whether it is looked up, and not multiplied."""
        return _is_lookup(self.roles)

    def counts(self, use: Use) -> bool:
        """Whether a use adds to the statistics: it reduces the axes that the matrix form does."""
        return use.roles == self.roles


class Decision(NamedTuple):
    """What is pruned, and what is not.

    Attributes:
        plans: FQN -> how.
        dense: FQN -> the reason why not.
        done: FQN -> how it was pruned, of those that were before.
        weights: FQN -> tensor of every weight that has a plan, not masked.
    """

    plans: dict[str, Plan]
    dense: dict[str, str]
    done: dict[str, Plan]
    weights: dict[str, Tensor]


def decide(
    frame: Frame,
    sparsifier: CalibratedSparsifier,
    mapping: SparsityMapping | None,
    is_done: Callable[[Plan], bool],
) -> Decision:
    """The plan of every weight that can be pruned, and the reason for the others.

    Args:
        frame: of the model.
        sparsifier: has the defaults, where there is no mapping.
        mapping: which weight gets which pattern and level.
        is_done: whether a weight has been pruned before.

    Raises:
        MappingError: the mapping does not fit the model.
        PatternError: a pattern that fits the storage of a weight but no matrix form.
        MaskError: a weight that could not be masked, or not be ranked.
    """
    dense = {parameter.fqn: parameter.text for parameter in frame.weights.dense}
    configs: Mapping[str, SparsityConfig | None] = dict.fromkeys(frame.weights)
    if mapping is not None:
        configs = assignment = mapping.resolve(frame.weights)
        dense |= assignment.dense
        for entry in assignment.unmatched:
            _log.warning("no weight matches %s of the mapping", entry)
    dense |= refusals(frame.model, frame.weights, dense, mapping)
    plans: dict[str, Plan] = {}
    done: dict[str, Plan] = {}
    for fqn, config in configs.items():
        if fqn in dense:
            continue
        site = frame.weights[fqn]
        try:
            _check_reachable(site, frame, mapping)
            plan = plan_site(frame, site, _config(sparsifier, fqn, config))
            if is_done(plan):
                done[fqn] = plan
                raise Unreachable("pruned already by this sparsifier")
            plans[fqn] = plan
        except Unreachable as error:
            dense[fqn] = str(error)
    for fqn, reason in dense.items():
        _log.info("%s stays dense: %s", fqn, reason)
    tensors = {canonical_fqn(name): tensor for name, tensor in named_tensors(frame.model)}
    weights = {fqn: tensors[fqn] for fqn in plans}
    _check_weights(frame.model, weights)
    return Decision(plans, dense, done, weights)


def plan_site(frame: Frame, site: WeightSite, config: SparsityConfig) -> Plan:
    """The plan of a weight of a model, see `make_plan`."""
    uses = frame.uses_of(site.fqn)
    groups = groups_in(uses) if frame.uses else groups_of_owner(frame.model, site)
    return make_plan(site, config, groups)


def _check_reachable(site: WeightSite, frame: Frame, mapping: SparsityMapping | None) -> None:
    """Raise `Unreachable` where the graph does not show the inputs of a weight."""
    uses = frame.uses_of(site.fqn)
    if uses and only_scales(uses) and not (mapping and mapping.names(site)):
        raise Unreachable("only a factor of constants; name it in the mapping to prune it")
    if any(use.node.graph is not frame.captured[0].graph.graph for use in uses):
        raise Unreachable("used in a subgraph, whose inputs are not seen")


def _config(
    sparsifier: CalibratedSparsifier, fqn: str, config: SparsityConfig | None
) -> SparsityConfig:
    """Pattern and level as the sparsifier reads them."""
    entry = {} if config is None else group_entry(config)
    found = sparsifier.pattern_of({**sparsifier.defaults, **entry})
    if found is None:
        raise MaskError(
            f"{fqn}: {type(sparsifier).__name__} has no default pattern; pass a mapping"
        )
    pattern, level = found
    return SparsityConfig(pattern, level if pattern.implied_level is None else None)


def _check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise `MaskError` for weights that could not be masked, or not be ranked."""
    for fqn, weight in weights.items():
        path, _, attribute = fqn.rpartition(".")
        owner = model.get_submodule(path)
        if mask_on(owner, attribute) is None:
            check_maskable(fqn, owner, attribute)
        if weight.is_meta:
            raise MaskError(f"{fqn} has no data, it is on the meta device; load the model first")
    check_memory(model, {id(weight): fqn for fqn, weight in weights.items()})
    if weights and contains_nan(*weights.values()):
        bad = next(fqn for fqn, weight in weights.items() if contains_nan(weight))
        raise MaskError(f"{bad} contains NaN; it cannot be ranked")


def make_plan(site: WeightSite, config: SparsityConfig, groups: tuple[Role, int]) -> Plan:
    """The plan of a weight.

    Args:
        site: of the map.
        config: that it gets.
        groups: (role of the axis that a grouped convolution splits, into how many).

    Raises:
        Unreachable: an operator that consumes it does not show its inputs.
        PatternError: the pattern fits the storage but no matrix form; the weight is named.
    """
    hidden = sorted({use.op for use in site.uses if not shows_inputs(use.op)})
    if hidden:
        raise Unreachable(f"the inputs of its uses in {', '.join(hidden)} are not seen")
    roles, notes = _roles(site)
    axis = roles.index(groups[0]) if groups[1] > 1 else 0
    try:
        tiling = config.pattern.tiling(site.shape, site.roles)
        grouped = (axis, groups[1])
        form = MatrixForm.of(site.shape, roles, tiling, grouped, config.level)
    except PatternError as error:
        raise PatternError(f"{site.fqn}: {error}") from error
    return Plan(site.fqn, config, form, roles, notes)


def groups_in(uses: Sequence[GraphUse]) -> tuple[Role, int]:
    """What convolutions make of the groups of a weight.

    Raises:
        Unreachable: they do not agree.
    """
    found = {groups_of(use.use.op, bind(use.node)) for use in uses}
    wide = {groups for groups in found if groups[1] > 1}
    if len(wide) > 1 or (wide and len(found) > 1):
        raise Unreachable("convolutions of different groups use it")
    return wide.pop() if wide else ("out", 1)


def shared_inputs(
    order: Sequence[str], uses: Sequence[GraphUse], plans: Mapping[str, Plan]
) -> dict[str, str]:
    """FQN -> the weight right before it, where both are used once and have the same inputs.

    So do the projections of one attention, and the gate of an MLP beside it.
    """
    by_weight: dict[str, list[GraphUse]] = {}
    for use in uses:
        by_weight.setdefault(use.fqn, []).append(use)
    return {
        fqn: before
        for before, fqn in pairwise(order)
        if len(by_weight[before]) == len(by_weight[fqn]) == 1
        and _key(by_weight[before][0], plans[before]) == _key(by_weight[fqn][0], plans[fqn])
    }


def _key(use: GraphUse, plan: Plan) -> tuple[object, ...]:
    """What the statistics of a weight follow from, for one use of a whole weight."""
    bound = bind(use.node)
    weight = bound.pop(use.use.arg, None)
    bound.pop(OPERATORS[use.use.op].bias, None)
    whole = isinstance(weight, fx.Node) and weight.op == "get_attr"
    others = (node for node in use.node.all_input_nodes if node is not weight)
    whole = whole and not any(writes(user) for node in others for user in node.users)
    outer = zip(plan.form.shape, plan.roles, strict=True)
    inner = tuple(size if role not in ("out", "dim") else None for size, role in outer)
    form = (plan.roles, inner, plan.form.order, plan.form.places)
    return (use.use.op, use.use.arg, sorted(bound.items(), key=str), form, whole or use.fqn)


def only_scales(uses: Sequence[GraphUse]) -> bool:
    """Whether a weight is only ever multiplied with constants, as a factor of another one is."""
    return all(use.constant and not _is_lookup(use.use.roles) for use in uses)


def _roles(site: WeightSite) -> tuple[tuple[Role, ...], tuple[str, ...]]:
    """Roles that the matrix form is made of, and notes on uses with others.

    Products come before lookups: a table that is also a head is a matrix.
    """
    products = [use.roles for use in site.uses if not _is_lookup(use.roles)]
    roles = products[0] if products else site.roles
    notes: tuple[str, ...] = ()
    if products and len(products) < len(site.uses):
        notes += ("its lookups are not counted, only its products",)
    if any(found != roles for found in products):
        notes += (f"only uses as {' x '.join(roles)} are counted",)
    slices = {use.slice for use in site.uses if use.slice is not None}
    if any(roles[dim] in ("in", "kernel") for dim, _, _ in slices):
        notes += ("used in parts along its inputs, whose products with one another are not seen",)
    return roles, notes


def _is_lookup(roles: Sequence[Role]) -> bool:
    return not _TABLE.isdisjoint(roles)
