"""What is to be done with each weight, decided before anything is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.operators import OPERATORS, bind, groups_of, shows_inputs, writes
from fx_sparsity.graph.weight_map import Use, WeightSite
from fx_sparsity.patterns import PatternError, Role, SparsityConfig
from fx_sparsity.pruning.matrix_form import MatrixForm
from fx_sparsity.pruning.walk import GraphUse

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
        form = MatrixForm.of(site.shape, roles, tiling, (axis, groups[1]))
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
    form = (plan.roles, inner, plan.form.order)
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
