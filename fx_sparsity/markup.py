"""HTML of tables, for notebooks and for files: whatever is put in is escaped."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Html(str):
    """Text that is HTML already, and is put in as it is."""

    __slots__ = ()


class Keyed(NamedTuple):
    """A cell that sorts by a number of its own.

    Attributes:
        shown: in the cell.
        key: to sort by.
    """

    shown: object
    key: float


def to_html(value: object) -> Html:
    """What stands for a value: integers in groups of three digits, floats with three digits."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html('<span class="none">-</span>')
    if type(value) is float:
        return Html(escape(f"{value:.3g}"))
    if type(value) is int:
        return Html(f"{value:,}")
    return Html(escape(str(value)))


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], sortable: bool = False
) -> Html:
    """A table whose cells carry what they sort by; numbers are aligned to the right.

    Args:
        header: titles of the columns.
        rows: a cell a column.
        sortable: buttons for titles, which need a script beside the table.
    """
    numeric = [any(_key(row[i]) is not None for row in rows) for i in range(len(header))]
    titles = [
        f'<th scope="col"{_aligned(right)}{_unsorted(sortable)}>{_title(title, sortable)}</th>'
        for title, right in zip(header, numeric, strict=True)
    ]
    lines = [
        "".join(_cell(cell, right) for cell, right in zip(row, numeric, strict=True))
        for row in rows
    ]
    head = f"<thead><tr>{''.join(titles)}</tr></thead>"
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return Html(f"<table>{head}<tbody>\n{body}\n</tbody></table>")


def folded(summary: str, inner: Html, opened: bool) -> Html:
    """Something under a line that opens and closes it."""
    state = " open" if opened else ""
    return Html(f"<details{state}><summary>{escape(summary)}</summary>{inner}</details>")


def paragraph(text: str) -> Html:
    """One of text, escaped."""
    return Html(f"<p>{escape(text)}</p>")


def _key(cell: object) -> float | None:
    if isinstance(cell, Keyed):
        return cell.key
    return float(cell) if isinstance(cell, int | float) else None


def _cell(cell: object, right: bool) -> str:
    key = _key(cell)
    sorts = "" if key is None else f' data-sort="{key:.9g}"'
    shown = cell.shown if isinstance(cell, Keyed) else cell
    return f"<td{_aligned(right)}{sorts}>{to_html(shown)}</td>"


def _aligned(right: bool) -> str:
    return ' style="text-align:right"' if right else ' style="text-align:left"'


def _unsorted(sortable: bool) -> str:
    return ' aria-sort="none"' if sortable else ""


def _title(title: str, sortable: bool) -> str:
    return f'<button type="button">{escape(title)}</button>' if sortable else escape(title)
