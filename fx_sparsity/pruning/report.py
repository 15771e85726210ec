"""What one-shot pruning has done, weight by weight."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fx_sparsity.reports import format_table


@dataclass(frozen=True)
class PrunedWeight:
    """One weight that was pruned.

    Attributes:
        fqn: of the weight.
        pattern: as `Pattern.parse` reads it.
        level: share that was to go.
        tokens: inputs that met it, of all groups.
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
class PruningReport(Mapping[str, PrunedWeight]):
    """FQN -> `PrunedWeight`, in the order of pruning.

    Attributes:
        weights: every weight that this call pruned.
        dense: FQN -> why it was not pruned, for the other weights and parameters.
        sequential: whether each weight saw what the pruned ones before it give out.
        why: how the statistics came about.
        batches: number of calibration batches.
        statistics_bytes: the most that statistics took at any one time.
        activation_bytes: the most that activations of all batches took between two weights; 0 where
            the running model was observed.
        seconds: of the whole call.
    """

    weights: tuple[PrunedWeight, ...]
    dense: Mapping[str, str]
    sequential: bool
    why: str
    batches: int
    statistics_bytes: int
    activation_bytes: int
    seconds: float

    def __getitem__(self, fqn: str) -> PrunedWeight:
        for weight in self.weights:
            if weight.fqn == fqn:
                return weight
        raise KeyError(fqn)

    def __iter__(self) -> Iterator[str]:
        return iter(weight.fqn for weight in self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __str__(self) -> str:
        rows = [
            (w.fqn, w.pattern, f"{w.level:.1%}", w.tokens, w.error, w.seconds, "; ".join(w.notes))
            for w in self.weights
        ]
        header = ("weight", "pattern", "level", "tokens", "error", "seconds", "notes")
        parts = [format_table(header, rows)]
        if self.dense:
            parts.append(format_table(("left dense", "reason"), list(self.dense.items())))
        parts.append(
            f"{'sequential' if self.sequential else 'all at once'}: {self.why}; "
            f"{self.batches} batches, {self.seconds:.1f} s, "
            f"at most {self.statistics_bytes / 2**20:.1f} MiB of statistics "
            f"and {self.activation_bytes / 2**20:.1f} MiB of activations"
        )
        return "\n\n".join(parts)
