"""One HTML file that tells what became of a model: everything is in it, nothing is loaded."""

import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from math import isfinite
from pathlib import Path

from fx_sparsity.markup import Html, Keyed, folded, html_table, paragraph, to_html
from fx_sparsity.reporting.density import Density
from fx_sparsity.reporting.facts import Facts, facts, says
from fx_sparsity.reporting.png import png_uri
from fx_sparsity.reports import Share

_EXAMPLES = 3
"""Weights whose pictures are shown large."""
_FIRST = (
    *("pattern", "sparsity before", "sparsity", "error", "error held out", "kernel"),
    *("gain at tokens", "bytes before", "bytes after", "verdict"),
)
"""Columns that come before all others, as far as they are there."""
_LONG = 40
"""Characters of a cell that is broken into lines."""
_NAMES = 3
"""Names that are shown unfolded for a reason."""


def write_html(
    path: str | Path,
    *parts: object,
    title: str = "Sparsity report",
    headline: Mapping[str, object] | None = None,
    reproduce: str = "",
) -> Path:
    """Write one self-contained HTML file of what the verbs return.

    Whatever is there of a weight map, an assignment, a record, a pruning report, a verification, a
    lowering report, a plan, or `densities(model)`, comes together in one table with a row a weight.
    Where two parts say something under the same title, the first of them counts.

    Args:
        path: of the file; it is overwritten.
        parts: at least one of what `find_weights`, `squash`, `prune`, `verify`, `lower`, `search`,
            `sparsify_checkpoint` and other verbs return.
        title: of the page.
        headline: title -> a figure, or a pair (before, after), such as a metric of your own; shown
            first. Numbers are shown with three digits, `Bytes` and `Share` in their units.
        reproduce: the command or code that makes it all, shown at the end.

    Returns:
        The path.

    Raises:
        TypeError: a part of an unknown kind.
        ValueError: there is no part, or a figure of the headline is a tuple of other than two.
        OSError: the file cannot be written.

    Examples:
        >>> weights = fxs.find_weights(nn.Linear(8, 8))
        >>> write_html("report.html", weights, headline={"accuracy": (0.91, 0.90)}).name
        'report.html'
    """
    if not parts:
        raise ValueError("parts: expected what a verb returned, found nothing to report")
    for name, figure in (headline or {}).items():
        if isinstance(figure, tuple) and len(figure) != 2:
            raise ValueError(f"headline: {name}: expected (before, after), found {figure!r}")
    page = _page(title, dict(headline or {}), [facts(part) for part in parts], reproduce)
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _page(title: str, own: dict[str, object], found: Sequence[Facts], reproduce: str) -> Html:
    columns: dict[str, dict[str, object]] = defaultdict(dict)
    reasons: dict[str, dict[str, str]] = defaultdict(dict)
    pictures: dict[str, Density] = {}
    headline = dict(own)
    for part in found:
        for name, cells in part.columns.items():
            columns[name] = _filled(columns[name], cells)
        for heading, told in part.reasons.items():
            reasons[heading] = {**told, **reasons[heading]}
        pictures = {**part.pictures, **pictures}
        headline = {**headline, **{k: v for k, v in part.headline.items() if k not in headline}}
    sections = [section for part in found for section in part.sections]
    notes = [note for part in found for note in part.notes]
    body = [
        f"<header><h1>{escape(title)}</h1></header>",
        f'<div class="cards">{"".join(_card(*item) for item in headline.items())}</div>',
        _gallery(pictures, columns.get("pattern", {})),
        _layers(columns, pictures),
        *(_section(name, content) for name, content in sections),
        *(_section(heading, _why(told)) for heading, told in reasons.items() if told),
        _section("Notes", Html("".join(map(paragraph, notes)))) if notes else "",
        _section("How to reproduce it", _recipe(reproduce)),
    ]
    room = files("fx_sparsity.reporting")
    style, script = ((room / name).read_text() for name in ("page.css", "page.js"))
    return Html(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, body))
        + f"\n</main><script>\n{script}</script></body></html>\n"
    )


def _filled(cells: Mapping[str, object], more: Mapping[str, object]) -> dict[str, object]:
    """Cells, and what others say where they say nothing."""
    return {**cells, **{fqn: cell for fqn, cell in more.items() if cells.get(fqn) is None}}


def _section(title: str, content: Html) -> Html:
    return Html(f"<section><h2>{escape(title)}</h2>{content}</section>")


def _card(title: str, figure: object) -> Html:
    """A figure; of two, how the second compares with the first."""
    if not isinstance(figure, tuple):
        inner = f'<div class="figure">{to_html(figure)}</div>'
    else:
        before, after = figure
        inner = (
            f'<div class="figure">{to_html(after)}</div>'
            f'<div class="before">before: {to_html(before)}{_change(before, after)}</div>'
            f"{_scale(before, after)}"
        )
    return Html(f'<div class="card"><div class="title">{escape(title)}</div>{inner}</div>')


def _change(before: object, after: object) -> str:
    """Such as `(-83%)`; nothing of shares, which are in percent, and of what is no number."""
    if not _comparable(before, after) or isinstance(after, Share):
        return ""
    assert isinstance(before, int | float)
    assert isinstance(after, int | float)
    change = (after - before) / abs(before)
    if abs(change) < 0.0005:
        return ""
    return f" ({change:+.0%})" if abs(change) >= 0.1 else f" ({change:+.1%})"


def _scale(before: object, after: object) -> str:
    """Two bars, the larger of which is full."""
    if not _comparable(before, after):
        return ""
    assert isinstance(before, int | float)
    assert isinstance(after, int | float)
    most = max(before, after)
    bars = (("was", before), ("is", after))
    return "".join(
        f'<div class="{name}" style="width:{max(0, x / most):.1%}"></div>' for name, x in bars
    )


def _comparable(before: object, after: object) -> bool:
    numbers = isinstance(before, int | float) and isinstance(after, int | float)
    return numbers and before > 0  # type: ignore[operator]


def _gallery(pictures: Mapping[str, Density], patterns: Mapping[str, object]) -> Html:
    """The first weight of each pattern, large, and others whose density varies most within them."""
    sparse = [fqn for fqn, picture in pictures.items() if picture.zeros]
    if not sparse:
        return Html("")
    first: dict[object, str] = {}
    for fqn in sparse:
        first.setdefault(patterns.get(fqn), fqn)
    varied = sorted(sparse, key=lambda fqn: -float(pictures[fqn].overview.std(correction=0)))
    shown = list(dict.fromkeys([*first.values(), *varied]))[:_EXAMPLES]
    cards = [
        f'<figure><div class="pair">{_picture(pictures[fqn], large=True)}</div><figcaption>'
        f"<b>{escape(str(patterns.get(fqn) or 'no pattern stated'))}</b>, "
        f"{Share(pictures[fqn].zeros)} zeros<br>{_code(fqn)}</figcaption></figure>"
        for fqn in shown
    ]
    told = (
        "Left: the first rows and columns, element by element. Right: the whole weight, in "
        "stronger colour where it is denser."
    )
    content = Html(f'{paragraph(told)}<div class="gallery">{"".join(cards)}</div>')
    return _section("Where the zeros are", content)


def _picture(density: Density, large: bool = False) -> Html:
    images = (
        ("first rows and columns", density.corner.float()),
        ("the whole weight", density.overview),
    )
    size = "large" if large else "small"
    return Html(
        "".join(
            f'<img class="{size}" alt="{name}" src="{png_uri(pixels)}">' for name, pixels in images
        )
    )


def _layers(columns: Mapping[str, Mapping[str, object]], pictures: Mapping[str, Density]) -> Html:
    """A row a weight."""
    names = list(dict.fromkeys(fqn for cells in columns.values() for fqn in cells))
    if not names:
        return Html("")
    titles = [*(title for title in _FIRST if title in columns), *columns]
    shown = {title: _barred(columns[title]) for title in titles if says(columns[title].values())}
    drawn: dict[str, object] = {
        fqn: Keyed(_picture(p), p.zeros) for fqn, p in pictures.items() if p.zeros
    }
    if drawn:
        shown = {"where not zero": drawn, **shown}
    rows = [(_code(fqn), *(_broken(cells.get(fqn)) for cells in shown.values())) for fqn in names]
    search = (
        '<p><label>Only names with <input type="search" class="filter"></label> '
        f"{len(names)} in all; a click on a title sorts.</p>"
    )
    content = html_table(("weight", *shown), rows, sortable=True)
    return _section("Weight by weight", Html(f'{search}<div class="scroll">{content}</div>'))


def _broken(cell: object) -> object:
    """Long text in a box that breaks it into lines."""
    long = isinstance(cell, str) and not isinstance(cell, Html) and len(cell) > _LONG
    return Html(f'<div class="long">{to_html(cell)}</div>') if long else cell


def _barred(cells: Mapping[str, object]) -> dict[str, object]:
    """Shares with a bar as long as they are, floats with one in proportion to the largest."""
    floats = [cell for cell in cells.values() if type(cell) is float and isfinite(cell)]
    most = max(floats, default=0.0)
    found = dict(cells)
    for fqn, cell in cells.items():
        if isinstance(cell, Share) or (type(cell) is float and isfinite(cell) and most > 0):
            length = cell if isinstance(cell, Share) else cell / most
            bar = f'<span class="bar" style="--part:{length:.0%}">{to_html(cell)}</span>'
            found[fqn] = Keyed(Html(bar), cell)
    return found


def _why(told: Mapping[str, str]) -> Html:
    """Reasons, the names under each."""
    names: dict[str, list[str]] = defaultdict(list)
    for fqn, reason in told.items():
        names[reason].append(fqn)
    rows = [(reason, len(fqns), _listed(fqns)) for reason, fqns in names.items()]
    return html_table(("reason", "weights", "which"), rows)


def _listed(names: Sequence[str]) -> Html:
    first, rest = names[:_NAMES], names[_NAMES:]
    more = folded(f"{len(rest)} more", _codes(rest), False) if rest else ""
    return Html(f"{_codes(first)}{more}")


def _codes(names: Iterable[str]) -> Html:
    return Html("<br>".join(map(_code, names)))


def _code(name: str) -> Html:
    """A name, which may be broken behind its dots."""
    return Html(f"<code>{escape(name).replace('.', '.<wbr>')}</code>")


def _recipe(reproduce: str) -> Html:
    shown = f"<pre><code>{escape(reproduce)}</code></pre>" if reproduce else ""
    used = ", ".join(f"{name} {version(name)}" for name in ("fx_sparsity", "torch"))
    place = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Html(f"{shown}{paragraph(f'Made with {used}; {place}.')}")
