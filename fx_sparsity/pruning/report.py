"""What one-shot pruning has done, weight by weight."""

from collections.abc import Mapping
from dataclasses import dataclass

from fx_sparsity.reports import WeightReport, format_table


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
        seconds: that solving took, without the passes over the data.
        notes: what a user should know.
    """

    fqn: str
    pattern: str
    level: float
    tokens: int
    error: float | None
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruningReport(WeightReport[PrunedWeight]):
    """FQN -> `PrunedWeight`, in the order of pruning.

    Attributes:
        rows: every weight that this call pruned.
        dense: FQN -> the reason why it was not, for the other weights and parameters.
        sequential: whether each weight saw what the pruned ones before it give out; where the
            reason speaks of blocks in turn, those of the blocks before it.
        reason: how the statistics came about.
        batches: number of calibration batches.
        statistics_bytes: the most that statistics took at any one time.
        activation_bytes: the most that activations of all batches took between two weights; 0 where
            the running model was observed.
        seconds: of the whole call.
    """

    rows: tuple[PrunedWeight, ...]
    dense: Mapping[str, str]
    sequential: bool
    reason: str
    batches: int
    statistics_bytes: int
    activation_bytes: int
    seconds: float

    def __str__(self) -> str:
        rows = [
            (w.fqn, w.pattern, f"{w.level:.1%}", w.tokens, w.error, w.seconds, "; ".join(w.notes))
            for w in self.rows
        ]
        header = ("weight", "pattern", "level", "tokens", "error", "seconds", "notes")
        parts = [format_table(header, rows)]
        if self.dense:
            parts.append(format_table(("stays dense", "reason"), list(self.dense.items())))
        parts.append(
            f"{'sequential' if self.sequential else 'all at once'}: {self.reason}; "
            f"{self.batches} batches, {self.seconds:.1f} s, "
            f"at most {self.statistics_bytes / 2**20:.1f} MiB of statistics "
            f"and {self.activation_bytes / 2**20:.1f} MiB of activations"
        )
        return "\n\n".join(parts)
