"""What one-shot pruning has done, weight by weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fx_sparsity.reports import Share, Table, WeightReport


@dataclass(frozen=True)
class PrunedWeight:
    """One weight that was pruned.

    Attributes:
        fqn: of the weight.
        pattern: as `Pattern.parse` reads it.
        level: share that was to go.
        tokens: of its inputs, of all groups.
        error: `||(W - W') X|| / ||W X||` over the calibration inputs, Frobenius norms; None where
            the method asked for no Gram matrix.
        columns: of the weight's matrix, one for each input of a token.
        held_out: the same over inputs of the batches that were held out; None where none were, or
            this weight met no input in them.
        seconds: that solving took, without the passes over the data.
        notes: what a user should know.
        groups: matrices that the weight consists of, such as experts.
        fewest: tokens of the group that met fewest.
        few: groups that met fewer tokens than they have inputs, of weights whose groups do not
            all meet the same, and of modules that are called experts.
    """

    fqn: str
    pattern: str
    level: float
    tokens: int
    error: float | None
    seconds: float
    notes: tuple[str, ...] = ()
    groups: int = 1
    fewest: int = 0
    few: int = 0
    columns: int = 0
    held_out: float | None = None


@dataclass(frozen=True)
class RebuiltBlock:
    """One block that was rebuilt.

    Attributes:
        path: of its module; empty for the whole model.
        before: mean over tokens of ||found - wanted||^2 / ||wanted||^2 of what the block gives out,
            after its weights were pruned.
        after: that, once it was rebuilt.
        held_out: batches that both were measured on and that were not optimized on; 0 where there
            were too few, and both are those of the optimized ones.
        note: why it was not rebuilt.
    """

    path: str
    before: float
    after: float
    held_out: int
    note: str = ""


@dataclass(frozen=True)
class PruningReport(WeightReport[PrunedWeight]):
    """FQN -> `PrunedWeight`, in the order of pruning.

    Attributes:
        rows: every weight that this call pruned.
        dense: FQN -> the reason why it was not, for the other weights and parameters.
        sequential: whether each weight saw what the pruned ones before it give out; where the
            reason speaks of blocks, those of the blocks before it.
        reason: how the statistics came about.
        batches: number of calibration batches.
        statistics_bytes: the most that statistics took at any one time.
        activation_bytes: the most that activations of all batches took between two weights; 0 where
            the running model was observed.
        seconds: of the whole call.
        blocks: what became of the blocks, where they were to be rebuilt.
    """

    rows: tuple[PrunedWeight, ...]
    dense: Mapping[str, str]
    sequential: bool
    reason: str
    batches: int
    statistics_bytes: int
    activation_bytes: int
    seconds: float
    blocks: tuple[RebuiltBlock, ...] = ()

    @property
    def few_tokens(self) -> str:
        """Which experts met fewer tokens than they have inputs, in words; empty where none did."""
        rows = [row for row in self.rows if row.few]
        if not rows:
            return ""
        few, groups = sum(row.few for row in rows), sum(row.groups for row in rows)
        least = min(rows, key=lambda row: row.fewest)
        return (
            f"{few} of {groups} experts in {len(rows)} weights met fewer tokens than they have "
            f"inputs, the fewest {least.fewest} in {least.fqn}; calibrate on more data, or with "
            "all_experts=True"
        )

    @property
    def singular(self) -> str:
        """Which other weights, solved with a Gram matrix, met fewer inputs than they have columns.

        In words; empty where none did.
        """
        solved = [row for row in self.rows if row.error is not None and not row.few]
        rows = [row for row in solved if row.fewest < row.columns]
        if not rows:
            return ""
        worst = max(rows, key=lambda row: row.columns / max(1, row.fewest))
        times = math.ceil(worst.columns / max(1, worst.fewest))
        return (
            f"{len(rows)} of {len(solved)} weights met fewer inputs than they have columns, the "
            f"fewest {worst.fewest} for {worst.columns} in {worst.fqn}: updates fit these and no "
            f"others; calibrate on {times} times as much data, or see what held_out= says"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know of the whole: too few data."""
        return tuple(text for text in (self.few_tokens, self.singular) if text)

    @property
    def tables(self) -> tuple[Table, ...]:
        """What was pruned, what stays dense, and the blocks; each if there is any."""
        judged = any(w.held_out is not None for w in self.rows)
        rows = [
            (
                *(w.fqn, w.pattern, Share(w.level), w.tokens, w.error),
                *((w.held_out,) if judged else ()),
                *(w.seconds, "; ".join(w.notes)),
            )
            for w in self.rows
        ]
        titles = ("error", "held out") if judged else ("error",)
        header = ("weight", "pattern", "level", "tokens", *titles, "seconds", "notes")
        found = [Table(header, rows)]
        if self.dense:
            found.append(Table(("stays dense", "reason"), list(self.dense.items())))
        if self.blocks:
            blocks = [
                (b.path or "the model", b.before, b.after, b.held_out, b.note) for b in self.blocks
            ]
            found.append(Table(("block", "pruned", "rebuilt", "held out", "notes"), blocks))
        return tuple(found)

    @property
    def summary(self) -> str:
        """How the statistics came about, and what they took."""
        return (
            f"{'sequential' if self.sequential else 'all at once'}: {self.reason}; "
            f"{self.batches} batches, {self.seconds:.1f} s, "
            f"at most {self.statistics_bytes / 2**20:.1f} MiB of statistics "
            f"and {self.activation_bytes / 2**20:.1f} MiB of activations"
        )

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables), *self.warnings, self.summary])
