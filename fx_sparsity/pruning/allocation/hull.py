"""The lower convex hull of what was measured."""

from collections.abc import Mapping


def lower_hull(points: Mapping[float, float]) -> list[tuple[float, float]]:
    """The points on the lower convex hull, from left to right.

    Args:
        points: x -> y.
    """
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points.items()):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Of the line through two points."""
    return (b[1] - a[1]) / (b[0] - a[0])
