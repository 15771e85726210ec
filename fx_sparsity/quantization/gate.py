"""The gate: what is true now, weight by weight, of a model that was sparsified and quantized."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx, nn

from fx_sparsity.graph.passes import WEIGHT_META
from fx_sparsity.masks import tiling_holds
from fx_sparsity.quantization.eager import read_modules
from fx_sparsity.quantization.stored import StoredWeight
from fx_sparsity.sparsifier import MaskRecord
from fx_sparsity.tables import format_table


class SparsityLostError(RuntimeError):
    """Weights are not as sparse, or sparser, than they were masked to be; all are named."""


@dataclass(frozen=True)
class VerifiedWeight:
    """One row of a `Verification`.

    Attributes:
        fqn: name of the weight in the float model.
        where: what stores it now; empty where nothing does.
        dtype, scheme: of what is stored.
        quantized: whether it is stored as integer codes.
        meant: whether it was meant to be; None where nobody said.
        wanted: masked elements.
        zero_in_code: masked elements whose stored value is zero; for codes, exactly the zero point.
        zero_dequantized: masked elements that dequantize to zero.
        extra: kept elements that are zero though quantizing alone leaves them non-zero; None where
            there is nothing to compare with.
        pattern: that the mask was made with; None for a method without one.
        pattern_holds: whether the stored zeros obey it; None without a pattern.
        max_change: largest change of a kept value against quantizing alone; None as for `extra`.
    """

    fqn: str
    where: str
    dtype: str
    scheme: str
    quantized: bool
    meant: bool | None
    wanted: int
    zero_in_code: int
    zero_dequantized: int
    extra: int | None
    pattern: str | None
    pattern_holds: bool | None
    max_change: float | None

    @property
    def share(self) -> float:
        """Share of masked elements that are zero in code space; 1 where nothing was masked."""
        return self.zero_in_code / self.wanted if self.wanted else 1.0

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words; empty where all is well."""
        if not self.where:
            return ("not found in the model",)
        faults = []
        if self.zero_in_code != self.wanted:
            faults.append(f"{self.wanted - self.zero_in_code} of {self.wanted} zeros lost")
        if self.extra:
            faults.append(f"{self.extra} zeros more than asked for")
        if self.pattern_holds is False:
            faults.append(f"pattern {self.pattern} broken")
        if self.meant and not self.quantized:
            faults.append("meant to be quantized, left in float")
        return tuple(faults)


@dataclass(frozen=True)
class Verification(Sequence[VerifiedWeight]):
    """What `verify` found: a row for every stored copy of every masked weight."""

    rows: tuple[VerifiedWeight, ...]

    @property
    def ok(self) -> bool:
        """Whether no row has a fault."""
        return not any(row.faults for row in self.rows)

    @property
    def share(self) -> float:
        """Share of all masked elements that are zero in code space."""
        wanted = sum(row.wanted for row in self.rows)
        return sum(row.zero_in_code for row in self.rows) / wanted if wanted else 1.0

    def raise_if_lost(self) -> "Verification":
        """Return self, or raise.

        Raises:
            SparsityLostError: naming every weight with a fault, and the fault.
        """
        lost = [f"{row.fqn}: {', '.join(row.faults)}" for row in self.rows if row.faults]
        if lost:
            raise SparsityLostError("\n".join(lost))
        return self

    def to_json(self) -> str:
        """The rows as a JSON list of objects, each with its `faults`."""
        return json.dumps([{**asdict(row), "faults": row.faults} for row in self.rows], indent=2)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[VerifiedWeight]:
        return iter(self.rows)

    def __str__(self) -> str:
        header = (
            "weight",
            "stored as",
            "pattern",
            "masked",
            "zero in code space",
            "extra zeros",
            "max change",
            "verdict",
        )
        rows = [
            (
                row.fqn,
                f"{row.dtype}, {row.scheme}" if row.where else "-",
                row.pattern,
                row.wanted,
                f"{row.zero_in_code} ({row.share:.1%})",
                row.extra,
                row.max_change,
                "; ".join(row.faults) or "ok",
            )
            for row in self.rows
        ]
        return format_table(header, rows)


def read_weights(model: nn.Module) -> list[StoredWeight]:
    """How a model stores its weights now: quantized modules, quantized graphs, float parameters.

    Args:
        model: a module; or a GraphModule on which `AnnotateWeights` ran before it was quantized.
    """
    if isinstance(model, fx.GraphModule) and any(WEIGHT_META in n.meta for n in model.graph.nodes):
        from fx_sparsity.quantization.pt2e import read_graph

        return list(read_graph(model))
    return list(read_modules(model))


def verify(
    model: nn.Module,
    record: Mapping[str, MaskRecord],
    *,
    reference: nn.Module | None = None,
    meant: Collection[str] | None = None,
) -> Verification:
    """Check, weight by weight, that what was masked is zero, and nothing else is.

    Zero means zero in code space: the stored code is the one that dequantizes to exactly zero. A
    float weight has to be zero itself.

    Args:
        model: sparsified, and quantized or not. Not changed.
        record: what `squash` returned, or a flow made.
        reference: the same model, quantized alike, without masks. With it, zeros beyond those that
            quantizing alone makes are found, and kept values are compared. Without it, only a float
            weight's further zeros are found.
        meant: FQNs of the weights that were meant to be quantized.
    """
    stored = read_weights(model)
    alone = {} if reference is None else _by_place(read_weights(reference))
    rows: list[VerifiedWeight] = []
    for fqn, mask in record.items():
        copies = [weight for weight in stored if weight.fqn == fqn]
        intended = None if meant is None else fqn in meant
        for i, weight in enumerate(copies):
            rows.append(_row(weight, mask, alone.get((fqn, i)), intended))
        if not copies:
            wanted = int((~mask.keep).sum())
            rows.append(
                VerifiedWeight(
                    fqn, "", "", "", False, intended, wanted, 0, 0, None, mask.pattern, None, None
                )
            )
    return Verification(tuple(rows))


def _by_place(weights: Iterable[StoredWeight]) -> dict[tuple[str, int], StoredWeight]:
    """Stored copies by FQN and by their turn among the copies of that weight."""
    found: dict[tuple[str, int], StoredWeight] = {}
    turns: dict[str, int] = {}
    for weight in weights:
        turn = turns.get(weight.fqn, 0)
        turns[weight.fqn] = turn + 1
        found[weight.fqn, turn] = weight
    return found


def _row(
    weight: StoredWeight, mask: MaskRecord, alone: StoredWeight | None, meant: bool | None
) -> VerifiedWeight:
    keep = mask.keep.to(weight.data.device)
    zeros, values = weight.zeros(), weight.dequantize()
    extra: int | None = None
    max_change: float | None = None
    if alone is not None:
        extra = int((zeros & keep & ~alone.zeros()).sum())
        change = (values - alone.dequantize()).abs()[keep]
        max_change = float(change.max()) if change.numel() else 0.0
    elif not weight.quantized:
        extra = int((zeros & keep).sum()) - mask.zeros
    holds = None
    if mask.tiling is not None and mask.level is not None:
        holds = tiling_holds(zeros, mask.tiling, mask.level)
    return VerifiedWeight(
        fqn=weight.fqn,
        where=weight.where,
        dtype=weight.dtype,
        scheme=weight.scheme,
        quantized=weight.quantized,
        meant=meant,
        wanted=int((~keep).sum()),
        zero_in_code=_count(zeros, keep),
        zero_dequantized=_count(values == 0, keep),
        extra=extra,
        pattern=mask.pattern,
        pattern_holds=holds,
        max_change=max_change,
    )


def _count(zeros: Tensor, keep: Tensor) -> int:
    return int(torch.logical_and(zeros, ~keep).sum())
