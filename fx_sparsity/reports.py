"""What reports of this package have in common: rows, text, HTML for notebooks, and plain data."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

from fx_sparsity.markup import folded, html_table, paragraph

Row = TypeVar("Row")
_OPEN = 30
"""Rows of a table that a notebook shows unfolded."""


class Share(float):
    """Part of a whole, in [0, 1]; shown in percent."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{float(self):.1%}"


class Bytes(int):
    """So many bytes; `str` says it in the unit that fits, text tables to the last one."""

    __slots__ = ()

    def __str__(self) -> str:
        size = float(self)
        for unit in ("B", "kB", "MB", "GB"):
            if abs(size) < 999.5:
                return f"{size:.3g} {unit}"
            size /= 1000
        return f"{size:.3g} TB"


class Table(NamedTuple):
    """Rows under a header; `str` is plain text.

    Attributes:
        header: titles of the columns.
        rows: a cell a column.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __str__(self) -> str:
        return format_table(self.header, self.rows)


class Tabular:
    """What can be shown as tables under one line."""

    @property
    def tables(self) -> tuple[Table, ...]:
        """The longest, a row a weight, first."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """What it comes to, in one line."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """The summary and the tables, for notebooks; long tables are folded."""
        parts = [
            folded(
                f"{len(table.rows)} x {table.header[0]}",
                html_table(table.header, table.rows),
                len(table.rows) <= _OPEN,
            )
            for table in self.tables
        ]
        return f"<div>{paragraph(self.summary)}{''.join(parts)}</div>"


class Report(Tabular):
    """What happened to weights, a row each. `str` makes a table of it.

    Attributes:
        rows: dataclasses.
    """

    rows: tuple[Any, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which JSON can hold: a list `rows`, and whatever else the report has."""
        plain: dict[str, Any] = _plain(self)
        return plain


class WeightReport(Report, Mapping[str, Row]):
    """FQN -> row.

    Attributes:
        rows: each with an `fqn` of its own.
        dense: FQN -> the reason why it stays dense.
    """

    rows: tuple[Row, ...]
    dense: Mapping[str, str]

    def __getitem__(self, fqn: str) -> Row:
        for name, row in zip(self, self.rows, strict=True):
            if name == fqn:
                return row
        raise KeyError(fqn)

    def __iter__(self) -> Iterator[str]:
        return iter(row.fqn for row in self.rows)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.rows)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [*map(_plain, value)] if isinstance(value, tuple | list) else value


def natural(name: str) -> list[str | int]:
    """What to sort names by, so that `layers.9` comes before `layers.10`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their widest cell; numbers to the right, text to the left."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    numeric = [
        bool(rows)
        and all(isinstance(row[i], int | float | None) for row in rows)
        and not any(isinstance(row[i], Share) for row in rows)
        for i in range(len(header))
    ]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, cells)])


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, Bytes):
        return f"{int(cell)}"
    return f"{cell:.4g}" if type(cell) is float else str(cell)
