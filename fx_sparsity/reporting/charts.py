"""Charts that are part of a page: SVG without anything from outside."""

from collections.abc import Sequence
from html import escape

from fx_sparsity.markup import Html, paragraph
from fx_sparsity.pruning.sparsity_plan import Point, SparsityPlan
from fx_sparsity.reports import Bytes

_WIDTH, _HEIGHT, _MARGIN, _FOOT = 560, 200, 56, 28


def front_chart(plan: SparsityPlan) -> Html:
    """Bytes of a search's choices against their predicted effect; what was evaluated is filled.

    Args:
        plan: whose front has a choice at least; its own is larger.
    """
    points = sorted(plan.front.rows, key=lambda point: point.bytes)
    across = _scaled([point.bytes for point in points], _MARGIN, _WIDTH - 12)
    down = _scaled([point.effect for point in points], _HEIGHT - _FOOT, 12)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    dots = "".join(
        _dot(plan, point, x, y) for point, x, y in zip(points, across, down, strict=True)
    )
    last, most = points[-1], max(point.effect for point in points)
    bottom = _HEIGHT - _FOOT
    return Html(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Bytes of each choice against its predicted effect">'
        f'<path class="axis" d="M{_MARGIN} 8V{bottom}H{_WIDTH - 8}"/>'
        f'<polyline class="line" points="{line}"/>{dots}'
        f'<text x="{_MARGIN - 6}" y="20" text-anchor="end">{most:.3g}</text>'
        f'<text x="{_MARGIN - 6}" y="{bottom}" text-anchor="end">'
        f"{min(point.effect for point in points):.3g}</text>"
        f'<text x="{_MARGIN}" y="{bottom + 18}">{Bytes(points[0].bytes)}</text>'
        f'<text x="{_WIDTH - 8}" y="{bottom + 18}" text-anchor="end">{Bytes(last.bytes)}</text>'
        "</svg>"
        + paragraph(
            "Up: the predicted effect on the output. Right: bytes. "
            f"Filled: {plan.name} was measured. Largest: what was chosen."
        )
    )


def _dot(plan: SparsityPlan, point: Point, x: float, y: float) -> str:
    tried = point.score is not None
    size = 7 if point.configs == plan.point.configs else 4
    score = f", {plan.name} {point.score:.4g}" if tried else ""
    told = escape(f"{point.pruned} weights pruned, {Bytes(point.bytes)}{score}")
    place = f'class="{"tried" if tried else "untried"}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"'
    return f"<circle {place}><title>{told}</title></circle>"


def _scaled(values: Sequence[float], start: float, end: float) -> list[float]:
    low, high = min(values), max(values)
    span = (high - low) or 1
    return [start + (value - low) / span * (end - start) for value in values]
