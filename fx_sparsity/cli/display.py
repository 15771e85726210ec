"""What commands show: rich tables on a terminal, plain lines in a pipe, JSON on request."""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fx_sparsity.reports import Share, format_table


def show(
    rows: Sequence[Mapping[str, Any]],
    *,
    as_json: bool,
    totals: Mapping[str, Any] | None = None,
    numeric: Sequence[str] = (),
) -> None:
    """Print rows that have the same keys.

    Args:
        rows: column -> value; floats are shares, shown in percent.
        as_json: one object with `rows` and `totals` instead of a table.
        totals: a last row.
        numeric: columns to align to the right.
    """
    if as_json:
        found = {"rows": rows} if totals is None else {"rows": rows, "totals": totals}
        click.echo(json.dumps(found, indent=2))
        return
    every = [*rows, totals] if totals is not None else list(rows)
    if not every:
        return
    header = list(every[0])
    cells = [[_text(row[key]) for key in header] for row in every]
    if not sys.stdout.isatty():
        click.echo(format_table(header, cells))
        return
    table = Table(show_footer=False)
    for key in header:
        table.add_column(key, justify="right" if key in numeric else "left", overflow="fold")
    for i, line in enumerate(cells):
        if totals is not None and i == len(cells) - 1:
            table.add_section()
        table.add_row(*map(Text, line))  # what looks like markup of rich in a name is none
    Console().print(table)


def grouped(
    rows: Sequence[Mapping[str, Any]], by: str, sums: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for all that have the same in one column: how many, sums, and the first of them.

    Args:
        rows: column -> value; the first column is the name.
        by: column.
        sums: columns to add up; what is None counts as nothing.
    """
    groups: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row[by]].append(row)
    return [
        {
            by: key,
            "tensors": len(group),
            **{column: sum(row[column] or 0 for row in group) for column in sums},
            "such as": next(iter(group[0].values())),
        }
        for key, group in groups.items()
    ]


def say(text: str, *, as_json: bool) -> None:
    """Print a sentence; nothing beside JSON."""
    if not as_json:
        click.echo(printable(text))


def printable(text: str) -> str:
    """Text in which control characters, which would act on a terminal, are escaped; not new lines.

    Names come from files, which anybody may have made.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return str(Share(value))
    return printable(str(value)).replace("\n", "\\n")
