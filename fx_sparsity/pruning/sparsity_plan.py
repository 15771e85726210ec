"""What a search finds: a budget, a plan that meets it, and what else there was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.mapping import SparsityMapping
from fx_sparsity.reports import Bytes, Report, Table, WeightReport

Cost = Literal["bytes", "milliseconds"]


@dataclass(frozen=True)
class Budget:
    """What a plan has to meet: one of the three.

    Attributes:
        score: of the evaluation: at least that where higher is better, else at most.
        bytes: at most, of the whole model as `fx_sparsity.save` writes it, without the header.
        milliseconds: at most, of one call of each layer that has a kernel, in all.
        saves: what a plan that meets a `score` is to save.

    Raises:
        ValueError: none or several are given.
    """

    score: float | None = None
    bytes: float | None = None
    milliseconds: float | None = None
    saves: Cost = "bytes"

    def __post_init__(self) -> None:
        given = [x for x in (self.score, self.bytes, self.milliseconds) if x is not None]
        if len(given) != 1:
            raise ValueError(
                f"budget: expected one of score, bytes and milliseconds, found {len(given)} of them"
            )

    @property
    def cost(self) -> Cost:
        """What is saved."""
        if self.score is not None:
            return self.saves
        return "bytes" if self.bytes is not None else "milliseconds"

    @property
    def limit(self) -> float | None:
        """Most that may be left of the cost; None of a budget of scores."""
        return self.bytes if self.milliseconds is None else self.milliseconds


@dataclass(frozen=True)
class Point:
    """One choice for all weights.

    Attributes:
        configs: FQN -> what it becomes, as `SparsityConfig.parse` reads it; None stays dense.
        effect: predicted: the sum of what its weights do alone to the output of the model.
        bytes: of the whole model as `fx_sparsity.save` writes it, without the header.
        milliseconds: of one call of each layer that has a kernel; None where none was measured.
        score: by the evaluation, of the model truly pruned; None where that was not done.
    """

    configs: Mapping[str, str | None]
    effect: float
    bytes: int
    milliseconds: float | None
    score: float | None = None

    @property
    def mapping(self) -> SparsityMapping:
        """For `prune`: every weight by its name."""
        mapping = SparsityMapping()
        for fqn, config in self.configs.items():
            mapping.set_module_name(fqn, config)
        return mapping

    @property
    def pruned(self) -> int:
        """Weights that do not stay dense."""
        return sum(config is not None for config in self.configs.values())


@dataclass(frozen=True)
class Front(Report):
    """Choices from dense to sparse: those of the least predicted effect, and what was evaluated.

    Attributes:
        rows: in the order of what they cost, the most first.
    """

    rows: tuple[Point, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """A row a choice."""
        lines = [
            (point.pruned, Bytes(point.bytes), point.milliseconds, point.effect, point.score)
            for point in self.rows
        ]
        return (Table(("pruned", "bytes", "ms", "effect", "score"), lines),)

    @property
    def summary(self) -> str:
        """How many choices there are."""
        tried = sum(point.score is not None for point in self.rows)
        return f"{len(self.rows)} choices, {tried} of them evaluated"

    def __str__(self) -> str:
        return str(self.tables[0])


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of a plan that is to be pruned.

    Attributes:
        fqn: of the weight.
        config: as `SparsityConfig.parse` reads it.
        effect: on the output of the model, of this weight alone.
        bytes: that `fx_sparsity.save` writes of it.
        milliseconds: of a call of its layer; None where that was not measured.
    """

    fqn: str
    config: str
    effect: float
    bytes: int
    milliseconds: float | None


@dataclass(frozen=True)
class SparsityPlan(WeightReport[PlannedWeight]):
    """FQN -> `PlannedWeight`, and what comes of them together.

    Attributes:
        rows: every weight that is to be pruned.
        dense: FQN -> the reason why not, of the others.
        point: the choice, and its figures.
        unpruned: the dense model, and its figures.
        front: other choices, and those that were evaluated.
        name: of the score.
        evaluations: calls of the evaluation.
        notes: what a user should know.
        seconds: of the whole search.
    """

    rows: tuple[PlannedWeight, ...]
    dense: Mapping[str, str]
    point: Point
    unpruned: Point
    front: Front
    name: str
    evaluations: int
    notes: tuple[str, ...]
    seconds: float

    @property
    def mapping(self) -> SparsityMapping:
        """For `prune`."""
        return self.point.mapping

    @property
    def score(self) -> float | None:
        """By the evaluation, of the model truly pruned by the plan."""
        return self.point.score

    @property
    def summary(self) -> str:
        """The figures of the plan beside those of the dense model, in one line."""
        point, unpruned = self.point, self.unpruned
        parts = [f"{self.name} {_text(point.score)} (dense {_text(unpruned.score)})"]
        parts.append(f"{point.bytes} of {unpruned.bytes} bytes")
        if point.milliseconds is not None:
            parts.append(f"{point.milliseconds:.4g} of {unpruned.milliseconds:.4g} ms")
        return ", ".join(parts)

    @property
    def tables(self) -> tuple[Table, ...]:
        """What is to be pruned, what stays dense if anything does, and other choices."""
        lines = [
            (row.fqn, row.config, row.effect, Bytes(row.bytes), row.milliseconds)
            for row in self.rows
        ]
        dense = Table(("stays dense", "reason"), list(self.dense.items()))
        return (
            Table(("weight", "pattern", "effect", "bytes", "ms"), lines),
            *((dense,) if self.dense else ()),
            *self.front.tables,
        )

    def __str__(self) -> str:
        told = f"{self.summary}; {self.evaluations} evaluations, {self.seconds:.1f} s"
        return "\n\n".join([*map(str, self.tables), "\n".join([told, *self.notes])])


class BudgetError(FxSparsityError, ValueError):
    """No plan meets a budget.

    Attributes:
        nearest: the plan that comes nearest.
    """

    def __init__(self, message: str, nearest: SparsityPlan) -> None:
        super().__init__(message, nearest)
        self.nearest = nearest

    def __str__(self) -> str:
        return f"{self.args[0]}; the nearest plan has {self.nearest.summary}"


def _text(score: float | None) -> str:
    return "not evaluated" if score is None else f"{score:.4g}"
