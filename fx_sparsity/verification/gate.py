"""The gate: what is true now, weight by weight, of a model that was sparsified and quantized."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph import find_weights
from fx_sparsity.masks import tightest_pattern, tiling_holds
from fx_sparsity.reports import Report, Share, Table
from fx_sparsity.sparsifier import MaskRecord
from fx_sparsity.verification.read import by_name, read_weights
from fx_sparsity.verification.stored import StoredWeight


class SparsityLostError(FxSparsityError, RuntimeError):
    """Weights are not as sparse, or sparser, than they were masked to be; all are named."""


@dataclass(frozen=True)
class VerifiedWeight:
    """One row of a `Verification`.

    Attributes:
        fqn: name of the weight in the float model.
        where: what stores it now; empty where nothing does.
        dtype: of what is stored.
        scheme: of what is stored.
        quantized: whether it is stored as integer codes.
        meant: whether it was meant to be; None where nobody said.
        elements: that are stored.
        zeros: how many of them are zero in code space.
        wanted: masked elements.
        zero_in_code: masked elements whose stored value is zero; for codes, exactly the zero point.
        zero_dequantized: masked elements that dequantize to zero.
        extra: kept elements that are zero though quantizing alone leaves them non-zero; None where
            there is nothing to compare with.
        pattern: that the mask was made with, None for a method without one; without a record, the
            tightest that the zeros follow, None where there are none or the axes are not known.
        pattern_holds: whether the stored zeros obey it, for the weight as a whole where this copy
            stores only a part; None without a pattern.
        max_change: largest change of a kept value against quantizing alone; None as for `extra`.
        changed: kept values that differ from it by more than `verify`'s tolerance.
        obstacle: what keeps the stored value from being what the consumer reads; empty as a rule.
        not_finite: kept values that are NaN or infinite, or become so by their scale.
        emptied: rows of codes that are all zero though the mask keeps some of them; the weight as
            a whole where its rows share a scale. Only counted where there is nothing to compare
            with, which would tell in `extra`.
        in_float: the reason why a quantizer was not meant to take it; empty where it was, or where
            nobody said.
    """

    fqn: str
    where: str
    dtype: str
    scheme: str
    quantized: bool
    meant: bool | None
    elements: int
    zeros: int
    wanted: int
    zero_in_code: int
    zero_dequantized: int
    extra: int | None
    pattern: str | None
    pattern_holds: bool | None
    max_change: float | None
    obstacle: str = ""
    not_finite: int = 0
    emptied: int = 0
    changed: int = 0
    in_float: str = ""

    @property
    def sparsity(self) -> float:
        """Share of the stored elements that are zero in code space."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def share(self) -> float:
        """Share of masked elements that are zero in code space; 1 where nothing was masked."""
        return self.zero_in_code / self.wanted if self.wanted else 1.0

    @property
    def left_in_float(self) -> bool:
        """Whether a quantizer was never meant to take it, and did not."""
        return self.meant is False and not self.quantized

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words; empty where all is well."""
        if not self.where:
            return ("not found in the model",)
        if self.obstacle:
            return (self.obstacle,)
        faults = []
        if self.zero_in_code != self.wanted:
            faults.append(f"{self.wanted - self.zero_in_code} of {self.wanted} zeros lost")
        if self.zero_dequantized < self.zero_in_code:
            count = self.zero_in_code - self.zero_dequantized
            faults.append(f"{count} zero codes do not dequantize to zero: scales are not finite")
        if self.not_finite:
            faults.append(f"{self.not_finite} kept values are NaN or infinite")
        if self.emptied:
            faults.append(f"{self.emptied} rows that should keep values are all zero")
        if self.changed:
            faults.append(f"{self.changed} kept values are not what quantizing alone makes of them")
        if self.extra:
            faults.append(f"{self.extra} zeros more than asked for")
        if self.pattern_holds is False:
            faults.append(f"pattern {self.pattern} broken")
        if self.meant and not self.quantized:
            faults.append("meant to be quantized, left in float")
        return tuple(faults)


@dataclass(frozen=True)
class Verification(Report, Sequence[VerifiedWeight]):
    """What `verify` found: a row for every stored copy of every masked weight.

    Attributes:
        rows: in the order of the record.
        record: of the masks, by names in the float model; None where there was none.
    """

    rows: tuple[VerifiedWeight, ...]
    record: Mapping[str, MaskRecord] | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether there is something to verify, and no row has a fault; also its truth value."""
        return bool(self.rows) and not any(row.faults for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def share(self) -> float:
        """Share of all masked elements that are zero in code space."""
        wanted = sum(row.wanted for row in self.rows)
        return sum(row.zero_in_code for row in self.rows) / wanted if wanted else 1.0

    def raise_if_lost(self) -> "Verification":
        """Return self, or raise.

        Raises:
            SparsityLostError: naming every weight with a fault, and the fault; or there is no
                weight to verify.
        """
        if not self.rows:
            raise SparsityLostError("there is no weight to verify: the record is empty")
        if not any(row.where for row in self.rows):
            raise SparsityLostError(
                f"none of the {len(self.rows)} weights of the record, such as {self.rows[0].fqn}, "
                "is found in the model: give the record of this model, by names that it has"
            )
        lost = [f"{row.fqn}: {', '.join(row.faults)}" for row in self.rows if row.faults]
        if lost:
            raise SparsityLostError("\n".join(lost))
        return self

    def to_dict(self) -> dict[str, Any]:
        """See `Report`; each row has its `faults`, too. The masks of the record are left out."""
        rows = Report.to_dict(replace(self, record=None))["rows"]
        found = zip(rows, self.rows, strict=True)
        return {"rows": [{**plain, "faults": list(row.faults)} for plain, row in found]}

    @overload
    def __getitem__(self, index: int) -> VerifiedWeight: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[VerifiedWeight, ...]: ...

    def __getitem__(self, index: int | slice) -> VerifiedWeight | tuple[VerifiedWeight, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[VerifiedWeight]:
        return iter(self.rows)

    @property
    def tables(self) -> tuple[Table, ...]:
        """A row a stored copy."""
        header = (
            "weight",
            "stored as",
            "sparsity",
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
                Share(row.sparsity) if row.where else None,
                row.pattern,
                row.wanted,
                f"{row.zero_in_code} ({row.share:.1%})",
                row.extra,
                row.max_change,
                "; ".join(row.faults) or _well(row),
            )
            for row in self.rows
        ]
        return (Table(header, rows),)

    @property
    def summary(self) -> str:
        """How many weights are as they should be."""
        well = sum(not row.faults for row in self.rows)
        left = sum(row.left_in_float for row in self.rows)
        return (
            f"{well} of {len(self.rows)} weights ok{f', {left} left in float' if left else ''}; "
            f"{self.share:.1%} of what was masked is zero in code space"
        )

    def __str__(self) -> str:
        return str(self.tables[0])


def _well(row: VerifiedWeight) -> str:
    """The verdict on a row without faults."""
    if not row.left_in_float:
        return "ok"
    return f"ok, in float: {row.in_float}" if row.in_float else "ok, in float"


def verify(
    model: nn.Module | ExportedProgram | str | Path,
    record: Mapping[str, MaskRecord] | None = None,
    *,
    reference: nn.Module | ExportedProgram | str | Path | None = None,
    meant: Collection[str] | None = None,
    in_float: Mapping[str, str] | None = None,
    tolerance: float = 1.0,
) -> Verification:
    """Check, weight by weight, that what was masked is zero, and nothing else is.

    Zero means zero in code space: the stored code is the one that dequantizes to exactly zero. A
    float weight has to be zero itself. A tied weight is checked wherever it is stored.

    Args:
        model: sparsified, and quantized or not; or the path of a file: what `torch.export.save` or
            AOTInductor wrote, see `read_pt2`, ONNX, see `read_onnx`, or an OpenVINO IR, see
            `read_openvino`. Not changed, and not run.
        record: what `squash` returned, or a flow made. Without one the rows tell what there is:
            how many zeros every weight of two or more dimensions has, and the tightest pattern
            that they follow.
        reference: the same model, quantized alike, without masks. With it, zeros beyond those that
            quantizing alone makes are found, and kept values are compared. Without it, only a float
            weight's further zeros are found.
        meant: FQNs of the weights that were meant to be quantized.
        in_float: FQN -> the reason why a weight was not, for the rows.
        tolerance: how far a kept value of codes may be from the reference's, as a share of that;
            what rounding takes comes on top. All of it by default, since what is normalized on the
            way to its codes is scaled otherwise without what was masked; less is known of what
            lies at the end of a range of codes. `math.inf` where kept values were updated by much.

    Examples:
        >>> model, sparsifier = nn.Linear(8, 4), fxs.WeightNormSparsifier()
        >>> model = fxs.prepare(model, sparsifier, (torch.randn(1, 8),), "2:4")
        >>> sparsifier.step()
        >>> model, record = fxs.squash(model, sparsifier)
        >>> fxs.verify(model, record).ok
        True
        >>> model.weight.data += 1
        >>> fxs.verify(model, record).rows[0].faults
        ('16 of 16 zeros lost', 'pattern 2:4 broken')
    """
    if record is None:
        return Verification(tuple(_found(model, meant)))
    names = {fqn: mask.aliases for fqn, mask in record.items()}
    held = read_weights(model)
    found = by_name(held, names)
    stored = {fqn: [_fitting(w, record[fqn]) for w in copies] for fqn, copies in found.items()}
    alone = {} if reference is None else by_name(read_weights(reference), names)
    rows: list[VerifiedWeight] = []
    for fqn, mask in record.items():
        intended = None if meant is None else fqn in meant
        copies = stored[fqn]
        holds = _holds(copies, mask)
        for i, weight in enumerate(copies):
            counterpart = alone[fqn][i] if fqn in alone and i < len(alone[fqn]) else None
            expected = None if weight.incidental else intended
            row = _row(fqn, weight, mask, counterpart, expected, holds[i])
            if row.left_in_float and in_float is not None:
                row = replace(row, in_float=in_float.get(fqn, ""))
            if counterpart is not None and weight.quantized and counterpart.quantized:
                row = replace(row, changed=_changed(weight, mask, counterpart, tolerance))
            rows.append(row)
        if not copies:
            rows.append(_missing(fqn, mask, intended))
    rows += [_bare(weight) for weight in held if weight.nameless and _may_be(weight, record)]
    return Verification(tuple(rows), record)


def _may_be(weight: StoredWeight, record: Mapping[str, MaskRecord]) -> bool:
    """Whether what has no name has as many elements as a masked weight."""
    return any(weight.data.numel() == mask.keep.numel() for mask in record.values())


def _bare(weight: StoredWeight) -> VerifiedWeight:
    """The row of what may be a copy of a masked weight, of which nothing else is known."""
    return VerifiedWeight(
        fqn=weight.fqn,
        where=weight.where,
        dtype=weight.dtype,
        scheme=weight.scheme,
        quantized=weight.quantized,
        meant=None,
        elements=weight.data.numel(),
        zeros=0,
        wanted=0,
        zero_in_code=0,
        zero_dequantized=0,
        extra=None,
        pattern=None,
        pattern_holds=None,
        max_change=None,
        obstacle=weight.obstacle,
    )


def _fitting(weight: StoredWeight, mask: MaskRecord) -> StoredWeight:
    """A copy as it is; with an obstacle where a mask of it cannot be, or be of use."""
    if mask.lost_zeros and not weight.obstacle:
        return replace(weight, obstacle=mask.lost_zeros)
    expected = mask.shape if weight.view is None else weight.view.size
    if weight.obstacle or tuple(weight.data.shape) == tuple(expected):
        return weight
    found = f"stored in shape {tuple(weight.data.shape)}, expected {tuple(expected)}"
    return replace(weight, obstacle=found)


def _found(
    model: nn.Module | ExportedProgram | str | Path, meant: Collection[str] | None
) -> Iterator[VerifiedWeight]:
    """What a model holds, where nobody recorded what it should."""
    sites = {} if isinstance(model, str | Path) else find_weights(model).by_any_name()
    roles = {name: site.roles for name, site in sites.items()}
    for weight in read_weights(model):
        if weight.data.ndim < 2:
            continue
        zeros = torch.zeros(0) if weight.obstacle else weight.zeros()
        axes = weight.roles or roles.get(weight.fqn) or roles.get(weight.where)
        if axes is not None and len(axes) != zeros.ndim:
            axes = None
        config = None if axes is None else tightest_pattern(zeros, axes)
        yield VerifiedWeight(
            fqn=weight.fqn,
            where=weight.where,
            dtype=weight.dtype,
            scheme=weight.scheme,
            quantized=weight.quantized,
            meant=None if meant is None else weight.fqn in meant,
            elements=zeros.numel(),
            zeros=int(zeros.count_nonzero()),
            wanted=0,
            zero_in_code=0,
            zero_dequantized=0,
            extra=None,
            pattern=None if config is None else config.short,
            pattern_holds=None if config is None else True,
            max_change=None,
            obstacle=weight.obstacle,
        )


def _missing(fqn: str, mask: MaskRecord, meant: bool | None) -> VerifiedWeight:
    """The row of a weight that the model does not hold."""
    return VerifiedWeight(
        fqn=fqn,
        where="",
        dtype="",
        scheme="",
        quantized=False,
        meant=meant,
        elements=0,
        zeros=0,
        wanted=int((~mask.keep).count_nonzero()),
        zero_in_code=0,
        zero_dequantized=0,
        extra=None,
        pattern=mask.pattern,
        pattern_holds=None,
        max_change=None,
    )


def _holds(copies: Sequence[StoredWeight], mask: MaskRecord) -> list[bool | None]:
    """Whether the zeros of each copy obey the pattern; parts of a weight are judged together."""
    tiling, level = mask.tiling, mask.level
    if tiling is None or level is None or not mask.keep.numel():
        return [None] * len(copies)
    whole = ~mask.keep  # what no part covers is not in question here
    for part in copies:
        if part.view is not None and not part.obstacle:
            part.put(whole, part.zeros())
    parts = tiling_holds(whole, tiling, level)
    return [
        None
        if copy.obstacle
        else parts
        if copy.view is not None
        else tiling_holds(copy.zeros(), tiling, level)
        for copy in copies
    ]


def _row(
    fqn: str,
    weight: StoredWeight,
    mask: MaskRecord,
    alone: StoredWeight | None,
    meant: bool | None,
    holds: bool | None,
) -> VerifiedWeight:
    kept = weight.seen(mask.keep)
    extra: int | None = None
    max_change: float | None = None
    zero_total = zero_in_code = zero_dequantized = not_finite = emptied = 0
    if not weight.obstacle:  # there may be no data, otherwise
        device = weight.data.device
        keep = kept.to(device)
        zeros, values = weight.zeros(), weight.dequantize()
        zero_total = int(zeros.count_nonzero())
        zero_in_code = int((zeros & ~keep).count_nonzero())
        zero_dequantized = int(((values == 0) & ~keep).count_nonzero())
        not_finite = int((~values.isfinite() & keep).count_nonzero())
        if alone is not None and not alone.obstacle:
            extra = int((zeros & keep & ~alone.zeros()).count_nonzero())
            change = (values - alone.dequantize()).abs()[keep]
            max_change = float(change.max()) if change.numel() else 0.0
        elif not weight.quantized:
            extra = int((zeros & keep & ~weight.seen(mask.kept_zeros).to(device)).count_nonzero())
        else:
            nonzero = keep & ~weight.seen(mask.kept_zeros).to(device)
            emptied = _emptied(zeros, nonzero, weight.scale)
    return VerifiedWeight(
        fqn=fqn,
        where=weight.where,
        dtype=weight.dtype,
        scheme=weight.scheme,
        quantized=weight.quantized,
        meant=meant,
        elements=weight.data.numel(),
        zeros=zero_total,
        wanted=int((~kept).count_nonzero()),
        zero_in_code=zero_in_code,
        zero_dequantized=zero_dequantized,
        extra=extra,
        pattern=mask.pattern,
        pattern_holds=holds,
        max_change=max_change,
        obstacle=weight.obstacle,
        not_finite=not_finite,
        emptied=emptied,
    )


def _changed(weight: StoredWeight, mask: MaskRecord, alone: StoredWeight, tolerance: float) -> int:
    """See `VerifiedWeight.changed`."""
    if weight.obstacle or alone.obstacle:
        return 0
    keep = weight.seen(mask.keep).to(weight.data.device)
    judged = keep & ~weight.zeros() & ~weight.at_the_end() & ~alone.at_the_end()
    change = (weight.dequantize() - alone.dequantize()).abs()
    allowed = tolerance * alone.dequantize().abs() + (weight.step() + alone.step()) / 2
    return int(((change > allowed) & judged).count_nonzero())


def _emptied(zeros: Tensor, nonzero: Tensor, scale: Tensor | None) -> int:
    """Rows that are all zero though some of their elements were not; see `VerifiedWeight`.

    A scale of its own gives the largest value of a row a code that is not zero.
    """
    by_row = scale is not None and scale.ndim > 1 and scale.shape[0] == len(zeros)
    rows = len(zeros) if by_row else 1
    empty = zeros.reshape(rows, -1).all(1) & nonzero.reshape(rows, -1).any(1)
    return int(empty.count_nonzero())
