"""What each kind of thing that the verbs return has to say in a report; one function a kind."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, NamedTuple

from fx_sparsity.checkpoints import CheckpointReport, Inspection
from fx_sparsity.checkpoints.inspection import DENSE_BELOW
from fx_sparsity.graph import Assignment, WeightMap
from fx_sparsity.lowering.report import LoweredWeight, LoweringReport
from fx_sparsity.markup import Html, html_table, paragraph
from fx_sparsity.patterns import Pattern, SparsityConfig
from fx_sparsity.pruning.report import PruningReport
from fx_sparsity.pruning.sparsity_plan import SparsityPlan
from fx_sparsity.reporting.charts import front_chart
from fx_sparsity.reporting.density import Densities, Density, density_of
from fx_sparsity.reports import Bytes, Share, Tabular
from fx_sparsity.sparsifier import SparsityRecord
from fx_sparsity.storage.load_sparse import LoadReport
from fx_sparsity.verification import Verification


class Change(NamedTuple):
    """A figure of the headline.

    Attributes:
        before: of the dense model.
        after: of what it has become.
    """

    before: object
    after: object


class Section(NamedTuple):
    """A part of a report with a heading of its own."""

    title: str
    content: Html


@dataclass(frozen=True)
class Facts:
    """What one part of a report contributes; all of it may be empty.

    Attributes:
        headline: title -> a figure, or a `Change`.
        columns: of the table of layers: title -> FQN -> cell.
        reasons: heading -> FQN -> why it is as the heading says.
        pictures: FQN -> where it is zero.
        sections: what fits nowhere else.
        notes: what a reader should know.
    """

    headline: Mapping[str, object] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    reasons: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    pictures: Mapping[str, Density] = field(default_factory=dict)
    sections: tuple[Section, ...] = ()
    notes: tuple[str, ...] = ()


DENSE = "What stays dense, and why"
NO_KERNEL = "What runs on dense kernels, and why"


@singledispatch
def facts(part: Any) -> Facts:
    """What a part of a report contributes. A new kind of part registers its function.

    Raises:
        TypeError: nothing is known of this kind of part.
    """
    raise TypeError(
        "expected what find_weights, squash, prune, verify, lower, search or another verb returns, "
        f"or densities(model), found {type(part).__name__}"
    )


@facts.register
def _(part: Facts) -> Facts:
    return part


@facts.register
def _(part: Tabular) -> Facts:
    """Any other report: its own tables."""
    tables = [_sortable(table.header, table.rows) for table in part.tables]
    content = Html("".join([paragraph(part.summary), *tables]))
    return Facts(sections=(Section(type(part).__name__, content),))


@facts.register
def _(part: WeightMap) -> Facts:
    values = sum(math.prod(site.shape) for site in part.sites)
    return Facts(
        headline={"values in weights": values},
        columns={
            "kind": {site.fqn: site.kind for site in part.sites},
            "axes": {site.fqn: site.axes for site in part.sites},
            "dtype": {site.fqn: site.dtype for site in part.sites},
            "tied to": {site.fqn: ", ".join(site.aliases) for site in part.sites if site.aliases},
        },
        reasons={DENSE: {other.fqn: other.text for other in part.dense}},
    )


@facts.register
def _(part: Assignment) -> Facts:
    return Facts(
        columns={"pattern": {fqn: str(config) for fqn, config in part.configs.items()}},
        reasons={DENSE: part.dense},
        notes=tuple(f"no weight matches {entry}" for entry in part.unmatched),
    )


@facts.register
def _(part: PruningReport) -> Facts:
    judged = any(row.held_out is not None for row in part.rows)
    noted = {row.fqn: "; ".join(row.notes) for row in part.rows if row.notes}
    columns: dict[str, Mapping[str, object]] = {
        "pattern": {row.fqn: _short(row.pattern, row.level) for row in part.rows},
        **_columns(part.rows, tokens="tokens", error="error"),
        **(_columns(part.rows, held_out="error held out") if judged else {}),
        **_columns(part.rows, seconds="seconds"),
        **({"notes": noted} if noted else {}),
    }
    blocks = [(b.path or "the model", b.before, b.after, b.held_out, b.note) for b in part.blocks]
    header = ("block", "error when pruned", "when rebuilt", "batches held out", "notes")
    rebuilt = Section("How far blocks are from the dense ones", _sortable(header, blocks))
    return Facts(
        columns=columns,
        reasons={DENSE: part.dense},
        sections=(rebuilt,) if blocks else (),
        notes=(*part.warnings, f"pruned {part.summary}"),
    )


@facts.register
def _(part: SparsityRecord) -> Facts:
    pictures = {fqn: density_of(~mask.keep, mask.roles) for fqn, mask in part.items()}
    masked = sum(math.prod(mask.shape) * pictures[fqn].zeros for fqn, mask in part.items())
    values = sum(math.prod(mask.shape) for mask in part.values())
    return Facts(
        headline={"zeros in masked weights": Share(masked / max(1, values))},
        columns={
            "pattern": {fqn: _short(mask.pattern, mask.level) for fqn, mask in part.items()},
            "sparsity": {fqn: Share(picture.zeros) for fqn, picture in pictures.items()},
        },
        pictures=pictures,
    )


@facts.register
def _(part: Verification) -> Facts:
    well = sum(not row.faults for row in part.rows)
    zeros, elements = (sum(getattr(r, key) for r in part.rows) for key in ("zeros", "elements"))
    record = part.record or {}
    asked = {fqn: _short(mask.pattern, mask.level) for fqn, mask in record.items()}
    stored, verdicts = defaultdict(list), defaultdict(list)
    for row in part.rows:
        stored[row.fqn].append(f"{row.dtype}, {row.scheme}" if row.where else "nowhere")
        verdicts[row.fqn].append("; ".join(row.faults) or "ok")
    return Facts(
        headline={
            "zeros in masked weights": Share(zeros / max(1, elements)),
            "gate": f"{well} of {len(part.rows)} ok",
        },
        columns={
            "pattern": {**{row.fqn: row.pattern for row in part.rows}, **asked},
            "sparsity": {row.fqn: Share(row.sparsity) for row in part.rows},
            "stored as": {fqn: _distinct(texts) for fqn, texts in stored.items()},
            "verdict": {fqn: _distinct(texts) for fqn, texts in verdicts.items()},
        },
        pictures={fqn: density_of(~mask.keep, mask.roles) for fqn, mask in record.items()},
        notes=(part.summary,),
    )


@facts.register
def _(part: LoweringReport) -> Facts:
    return Facts(
        headline={
            "weights in memory (lowering)": Change(
                Bytes(part.bytes_before), Bytes(part.bytes_after)
            ),
            "on sparse kernels": f"{len(part.lowered)} of {len(part)}",
        },
        columns={
            "pattern": {row.fqn: _found(row) for row in part.rows},
            "kernel": {row.fqn: row.kernel for row in part.rows},
            "gain at tokens": {row.fqn: row.gains for row in part.rows if row.gains},
            "bytes before": {row.fqn: Bytes(row.bytes_before) for row in part.rows},
            "bytes after": {row.fqn: Bytes(row.bytes_after) for row in part.rows},
        },
        reasons={NO_KERNEL: part.dense},
        notes=part.notes,
    )


@facts.register
def _(part: SparsityPlan) -> Facts:
    point, dense = part.point, part.unpruned
    headline = {
        part.name: Change(dense.score, point.score),
        "bytes of the file": Change(Bytes(dense.bytes), Bytes(point.bytes)),
    }
    if point.milliseconds is not None:
        headline["milliseconds of layers"] = Change(dense.milliseconds, point.milliseconds)
    (choices,) = part.front.tables
    shown = _sortable(choices.header, choices.rows)
    front = Section("What the search chose from", Html(front_chart(part) + shown))
    return Facts(
        headline=headline,
        columns={
            **_columns(part.rows, config="pattern", effect="effect alone"),
            "planned bytes": {row.fqn: Bytes(row.bytes) for row in part.rows},
        },
        reasons={DENSE: part.dense},
        sections=(front,),
        notes=(f"{part.evaluations} evaluations in {part.seconds:.3g} s", *part.notes),
    )


@facts.register
def _(part: CheckpointReport) -> Facts:
    pruned = [row for row in part.rows if row.pattern is not None and row.zeros is not None]
    return Facts(
        columns={
            **_columns(pruned, pattern="pattern"),
            "sparsity": {r.fqn: Share((r.zeros or 0) / max(1, r.elements)) for r in pruned},
        },
        reasons={DENSE: part.dense},
    )


@facts.register
def _(part: LoadReport) -> Facts:
    return Facts(
        columns={"loaded as": {row.fqn: row.module for row in part.rows}},
        reasons={DENSE: part.dense},
    )


@facts.register
def _(part: Densities) -> Facts:
    return Facts(
        columns={"sparsity": {fqn: Share(picture.zeros) for fqn, picture in part.items()}},
        pictures=part,
    )


@facts.register
def _(part: Inspection) -> Facts:
    stated = [row for row in part.rows if row.stated is not None]
    held = sum(bool(row.holds) for row in stated)
    gate = {"stated patterns": f"{held} of {len(stated)} hold"} if stated else {}
    return Facts(
        headline={
            "values": part.elements,
            "zeros": part.sparsity,
            "bytes": part.bytes,
            "bytes in the smallest formats": part.smallest,
            **gate,
        },
        columns={
            "dtype": {row.fqn: row.dtype for row in part.rows},
            "shape": {row.fqn: "x".join(map(str, row.shape)) for row in part.rows},
            "sparsity": {row.fqn: row.sparsity for row in part.rows},
            "pattern": {row.fqn: row.pattern for row in part.rows},
            "bytes": {row.fqn: Bytes(row.bytes) for row in part.rows},
            "smallest": {row.fqn: Bytes(row.smallest) for row in part.rows},
            "stated otherwise": {r.fqn: r.stated for r in stated if r.stated != r.pattern},
            "verdict": {r.fqn: r.verdict for r in stated},
        },
    )


@dataclass(frozen=True)
class Compared:
    """A checkpoint beside the one that it was made of.

    Attributes:
        before, after: what they hold.
    """

    before: Inspection
    after: Inspection


@facts.register
def _(part: Compared) -> Facts:
    before, after = part.before, part.after
    told = facts(after)
    columns = dict(told.columns)
    columns["bytes after"] = columns.pop("bytes")
    return Facts(
        headline={
            **told.headline,
            "zeros": Change(before.sparsity, after.sparsity),
            "bytes": Change(before.bytes, after.bytes),
        },
        columns={
            **columns,
            "sparsity before": {row.fqn: row.sparsity for row in before.rows},
            "bytes before": {row.fqn: Bytes(row.bytes) for row in before.rows},
        },
    )


def says(cells: Iterable[object]) -> bool:
    """Whether a column has something in it."""
    return any(cell is not None and cell != "" for cell in cells)


def _sortable(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """A table without the columns that say nothing."""
    kept = [i for i in range(len(header)) if says(row[i] for row in rows)]
    return html_table(
        [header[i] for i in kept], [[row[i] for i in kept] for row in rows], sortable=True
    )


def _columns(rows: Iterable[Any], **titles: str) -> dict[str, dict[str, object]]:
    """Attributes of rows as columns: attribute -> title."""
    found = list(rows)
    return {title: {row.fqn: getattr(row, key) for row in found} for key, title in titles.items()}


def _short(pattern: str | None, level: float | None) -> str | None:
    """Pattern and level for people; None of a mask without a pattern."""
    if pattern is None or level is None:
        return pattern
    parsed = Pattern.parse(pattern)
    return pattern if parsed.implied_level is not None else SparsityConfig(parsed, level).short


def _found(row: LoweredWeight) -> str | None:
    """The pattern that zeros follow, where there are more than a few."""
    return row.pattern if row.density is not None and row.density <= 1 - DENSE_BELOW else None


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
