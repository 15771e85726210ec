"""What reports of this package have in common: rows, text and plain data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

Row = TypeVar("Row")


class Report:
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


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their widest cell; numbers to the right, text to the left."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
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
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
