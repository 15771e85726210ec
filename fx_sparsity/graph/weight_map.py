"""What discovery returns: the weights of a model, and what stays dense with the reason."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from fx_sparsity.patterns import Role
from fx_sparsity.reports import Table, Tabular


@dataclass(frozen=True)
class Use:
    """One operator that consumes a weight.

    Attributes:
        op: the operator's name in the table, such as `linear`.
        node: name of the consuming node in the captured graph.
        arg: name of the operator's argument that receives the weight.
        roles: of the weight's axes in this use.
        slice: (dimension, start, stop) where only a part is used, as of packed projections.
        reordered: axes along which the operator does not see the elements as they are stored, one
            after the other: it sees them permuted or repeated, or what a product of constants has
            made of them. Neighbours there are none in use.
        moved_by: an operator on the way behind which a zero of the weight is no zero any more, such
            as `sub` where a weight is standardized; empty where zeros survive.
    """

    op: str
    node: str
    arg: str
    roles: tuple[Role, ...]
    slice: tuple[int, int, int] | None = None
    reordered: tuple[int, ...] = ()
    moved_by: str = ""


@dataclass(frozen=True)
class WeightSite:
    """One weight, by tensor identity.

    Attributes:
        fqn: canonical name, the first that the model lists.
        aliases: its further names, where it is tied.
        owner: FQN of the module that holds it; the root is the empty string.
        owner_type: that module's class, as `package.Class`.
        kind: `linear`, `embedding`, `embedding_bag`, `conv`, `matmul`, ... by its first use.
        roles: of each axis, by its first use.
        shape: of the whole parameter.
        dtype: such as `float32`.
        uses: in graph order.
    """

    fqn: str
    aliases: tuple[str, ...]
    owner: str
    owner_type: str
    kind: str
    roles: tuple[Role, ...]
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[Use, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, the canonical one first."""
        return self.fqn, *self.aliases

    @property
    def axes(self) -> str:
        """Roles and sizes, such as `out 64 x in 32`."""
        pairs = zip(self.roles, self.shape, strict=True)
        return " x ".join(f"{role} {size}" for role, size in pairs)

    @property
    def lost_zeros(self) -> str:
        """Why zeros of the weight are none where it is used; empty where they survive."""
        moved = dict.fromkeys(use.moved_by for use in self.uses if use.moved_by)
        return f"{Reason.ZEROS}: {', '.join(moved)}" if moved else ""


class Reason(StrEnum):
    """Why a tensor of two or more dimensions is not a weight. The list is closed."""

    SCALE = "only scales, element by element"
    ADDED = "only added"
    NOT_FLOATING = "not floating"
    UNREACHABLE = "does not reach the outputs for these inputs"
    OPERATOR = "operator without a row in the table"
    FRONTEND = "the graph does not show it"
    BUFFER = "no parameter: a buffer"
    CONSTANT = "no parameter: a constant or an attribute"
    ZEROS = "zeros do not survive"
    UNMASKABLE = "no mask can stand on it"

    @property
    def explained(self) -> bool:
        """Whether the reason settles the matter; the others mean that a weight may be missed."""
        return self not in (Reason.OPERATOR, Reason.FRONTEND)


@dataclass(frozen=True)
class DenseParameter:
    """A parameter of two or more dimensions that got no role, or a weight that is no parameter.

    Attributes:
        fqn: canonical name.
        shape: of the parameter.
        reason: from the closed list.
        detail: the operator concerned, where one is.
    """

    fqn: str
    shape: tuple[int, ...]
    reason: Reason
    detail: str = ""

    @property
    def text(self) -> str:
        """Reason and detail."""
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


@dataclass(frozen=True)
class WeightMap(Tabular, Mapping[str, WeightSite]):
    """Canonical FQN -> `WeightSite`, in graph order.

    Attributes:
        sites: every weight found.
        dense: every parameter of two or more dimensions that got no role, and what acts as a weight
            without being a parameter.
        vectors: number of parameters of fewer dimensions, which are never weights.
        frontend: which capture the map was read from.
    """

    sites: tuple[WeightSite, ...]
    dense: tuple[DenseParameter, ...] = ()
    vectors: int = 0
    frontend: str = ""
    _by_name: dict[str, WeightSite] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = {site.fqn: site for site in self.sites}
        object.__setattr__(self, "_by_name", names)

    def __getitem__(self, fqn: str) -> WeightSite:
        return self._by_name[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The weights, and what stays dense if anything does."""
        rows = [
            (
                site.fqn,
                site.kind,
                site.axes,
                site.dtype,
                len(site.uses),
                ", ".join(site.aliases),
            )
            for site in self.sites
        ]
        found = Table(("weight", "kind", "axes", "dtype", "uses", "tied to"), rows)
        if not self.dense:
            return (found,)
        rest = [(p.fqn, str(p.shape), p.text) for p in self.dense]
        return found, Table(("stays dense", "shape", "reason"), rest)

    @property
    def summary(self) -> str:
        """How much there is of what."""
        values = sum(math.prod(site.shape) for site in self.sites)
        return (
            f"{len(self)} weights of {values:,} values; {len(self.dense)} other tensors of two or "
            f"more dimensions; {self.vectors} one-dimensional parameters; read from {self.frontend}"
        )

    def __str__(self) -> str:
        text = "\n\n".join(map(str, self.tables))
        if not self.dense:
            text += "\n\nnothing of two or more dimensions stays dense"
        lost = [f"{site.fqn}: {site.lost_zeros}" for site in self.sites if site.lost_zeros]
        text = "\n".join([text, *lost])
        return f"{text}\n({self.vectors} one-dimensional parameters; read from {self.frontend})"

    def by_any_name(self) -> dict[str, WeightSite]:
        """Every name of every weight -> its site."""
        return {name: site for site in self.sites for name in site.names}

    def renamed(self, names: Mapping[str, str]) -> "WeightMap":
        """The same weights in a model that calls some of them differently.

        Args:
            names: FQN here -> FQN there; those that are missing keep theirs.
        """
        sites = []
        for site in self.sites:
            fqn = names.get(site.fqn, site.fqn)
            others = dict.fromkeys(names.get(alias, alias) for alias in site.aliases)
            aliases = tuple(alias for alias in others if alias != fqn)
            owner = fqn.rpartition(".")[0]
            sites.append(replace(site, fqn=fqn, aliases=aliases, owner=owner))
        return replace(self, sites=tuple(sites))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `frontend`, `sites`, `dense` and `vectors`."""
        return {
            "frontend": self.frontend,
            "sites": [asdict(site) for site in self.sites],
            "dense": [asdict(parameter) for parameter in self.dense],
            "vectors": self.vectors,
        }
