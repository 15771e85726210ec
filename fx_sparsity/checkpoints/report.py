"""What became of the weights of a checkpoint."""

from dataclasses import dataclass

from fx_sparsity.patterns import Role
from fx_sparsity.reports import Table, WeightReport


@dataclass(frozen=True)
class CheckpointWeight:
    """What became of one weight of a checkpoint.

    Attributes:
        fqn: its name.
        pattern: and level, as `SparsityConfig.parse` reads them; None where it stays dense.
        reason: why it stays dense; empty otherwise.
        roles: of its axes.
        elements: of it, as written.
        zeros: of it, as written; not counted where it stays dense.
    """

    fqn: str
    pattern: str | None
    reason: str
    roles: tuple[Role, ...]
    elements: int
    zeros: int | None


@dataclass(frozen=True)
class CheckpointReport(WeightReport[CheckpointWeight]):
    """Name -> `CheckpointWeight`, for every weight of a checkpoint."""

    rows: tuple[CheckpointWeight, ...]

    @property
    def dense(self) -> dict[str, str]:  # type: ignore[override]
        """Name -> the reason why it stays dense."""
        return {row.fqn: row.reason for row in self.rows if row.pattern is None}

    @property
    def tables(self) -> tuple[Table, ...]:
        """A row a weight."""
        cells = [
            (row.fqn, row.pattern or "dense", row.zeros, row.elements, row.reason)
            for row in self.rows
        ]
        return (Table(("weight", "pattern", "zeros", "of", "stays dense because"), cells),)

    @property
    def summary(self) -> str:
        """How many weights have a pattern."""
        return f"{len(self) - len(self.dense)} of {len(self)} weights have a pattern"

    def __str__(self) -> str:
        return str(self.tables[0])
