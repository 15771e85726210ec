"""What lowering has done, weight by weight."""

from collections.abc import Mapping
from dataclasses import dataclass

from fx_sparsity.kernels.packings import DENSE
from fx_sparsity.reports import Bytes, Share, Table, WeightReport


@dataclass(frozen=True)
class LoweredWeight:
    """One weight of the model, lowered or not.

    Attributes:
        fqn: of the weight.
        pattern: the tightest that its zeros follow; None without zeros, or where it was not read.
        density: share of values that are not zero; None where it was not read.
        kernel: name of the packing that it has now; None where it stays dense.
        gain: tokens a call -> how many times faster than dense this was measured here, of the
            chosen packing, or of the best where none paid; empty where nothing was measured.
        up_to: most tokens a call that the kernel takes, where the dense form was kept for others.
        bytes_before: of the weight with its scales.
        bytes_after: of its packed form.
        reason: why it stays dense; empty where it was lowered.
    """

    fqn: str
    pattern: str | None
    density: float | None
    kernel: str | None
    gain: Mapping[int, float]
    up_to: int | None
    bytes_before: int
    bytes_after: int
    reason: str

    @property
    def gains(self) -> str:
        """Such as `1.9x at 1 token, 1.4x at 4`; empty where nothing was measured."""
        parts = [f"{ratio:.2g}x at {tokens}" for tokens, ratio in self.gain.items()]
        return ", ".join(parts)


@dataclass(frozen=True)
class LoweringReport(WeightReport[LoweredWeight]):
    """FQN -> `LoweredWeight`, in the order of the model: every weight has its row.

    Attributes:
        rows: of all weights, lowered or not.
        notes: what a user should know of the whole.
    """

    rows: tuple[LoweredWeight, ...]
    notes: tuple[str, ...] = ()

    @property
    def lowered(self) -> tuple[str, ...]:
        """FQNs of the weights that have a kernel now."""
        return tuple(row.fqn for row in self.rows if row.kernel is not None)

    @property
    def dense(self) -> dict[str, str]:  # type: ignore[override]
        """FQN -> the reason why it stays dense, for the others."""
        return {row.fqn: row.reason for row in self.rows if row.kernel is None}

    @property
    def bytes_before(self) -> int:
        """Of all weights of the report."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Of all weights of the report."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def tables(self) -> tuple[Table, ...]:
        """What was lowered, and what was not; each if there is any."""
        done = [
            (
                row.fqn,
                row.pattern,
                _share(row.density),
                row.kernel if row.up_to is None else f"{row.kernel} up to {row.up_to} tokens",
                row.gains or "not measured",
                Bytes(row.bytes_before),
                Bytes(row.bytes_after),
            )
            for row in self.rows
            if row.kernel is not None
        ]
        rest = [
            (row.fqn, row.pattern, _share(row.density), row.reason)
            for row in self.rows
            if row.kernel is None
        ]
        header = ("lowered", "pattern", "density", "kernel", "gain at tokens")
        found = (
            Table((*header, "bytes before", "after"), done),
            Table(("stays dense", "pattern", "density", "reason"), rest),
        )
        return tuple(table for table in found if table.rows)

    @property
    def summary(self) -> str:
        """How many weights have a kernel, and what that takes."""
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        dense = sum(row.kernel is not None and row.kernel.startswith(DENSE) for row in self.rows)
        kernels = f", {dense} of them by kernels for dense weights" if dense else ""
        return (
            f"{len(self.lowered)} of {len(self)} weights lowered{kernels}; "
            f"{before:.3g} MiB of weights before, {after:.3g} MiB after"
        )

    def __str__(self) -> str:
        last = "\n".join([self.summary, *self.notes])
        return "\n\n".join([*map(str, self.tables), last])


def _share(share: float | None) -> Share | None:
    return None if share is None else Share(share)
