"""Figures for papers and notebooks; needs `pip install "fx_sparsity[plots]"`."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.pruning.report import PruningReport
from fx_sparsity.pruning.sparsity_plan import SparsityPlan
from fx_sparsity.reporting.density import Density
from fx_sparsity.reports import Bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_BLUE = "#256dd6"


class MissingPlotsError(FxSparsityError, RuntimeError):
    """matplotlib is not installed."""


def plot_density(density: Density, title: str = "") -> "Figure":
    """The first rows and columns of a weight, and the whole of it downsampled.

    Args:
        density: from `densities(model)[fqn]` or `density_of(weight == 0)`.
        title: of the figure, such as the name of the weight.

    Raises:
        MissingPlotsError: matplotlib is not installed.
    """
    figure, (corner, overview) = _new(1, 2, (7, 3.6))
    for axes, pixels, name in (
        (corner, density.corner.float(), "the first rows and columns"),
        (overview, density.overview, "the whole weight"),
    ):
        axes.imshow(pixels.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(name, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(", ".join(filter(None, (title, f"{density.zeros:.1%} zeros"))))
    return figure


def plot_layers(report: PruningReport) -> "Figure":
    """Level and error of every weight, in the order of pruning.

    Args:
        report: from `prune`; a weight without an error has no point.

    Raises:
        MissingPlotsError: matplotlib is not installed.
    """
    figure, (levels, errors) = _new(2, 1, (max(6, 0.14 * len(report)), 5), sharex=True)
    places = range(len(report))
    levels.bar(places, [100 * row.level for row in report.rows], color=_BLUE)
    levels.set_ylabel("level (%)")
    _points(errors, [row.error for row in report.rows], "calibration")
    if any(row.held_out is not None for row in report.rows):
        _points(errors, [row.held_out for row in report.rows], "held out")
        errors.legend()
    errors.set_ylabel("error")
    errors.set_xticks(places, [row.fqn for row in report.rows], rotation=90, fontsize=6)
    return figure


def plot_front(plan: SparsityPlan) -> "Figure":
    """The choices of a search: bytes against the predicted effect, and the scores measured.

    Args:
        plan: from `search`.

    Raises:
        MissingPlotsError: matplotlib is not installed.
    """
    figure, (effects, scores) = _new(1, 2, (9, 3.8))
    points = plan.front.rows
    effects.plot([p.bytes / 1e6 for p in points], [p.effect for p in points], "o-", color=_BLUE)
    effects.set_ylabel("predicted effect")
    tried = [(p.bytes / 1e6, p.score) for p in points if p.score is not None]
    scores.plot(*zip(*tried, strict=True), "o", color=_BLUE, label="evaluated")
    chosen = Bytes(plan.point.bytes)
    if plan.score is not None:
        label = f"chosen, {chosen}"
        scores.plot([chosen / 1e6], [plan.score], "o", ms=11, mfc="none", color=_BLUE, label=label)
    scores.set_ylabel(plan.name)
    scores.legend()
    for axes in (effects, scores):
        axes.set_xlabel("MB")
    return figure


def _points(axes: "Axes", values: Sequence[float | None], label: str) -> None:
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "o-", ms=3, label=label)


def _new(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    """A figure and its axes, which no window shows."""
    if find_spec("matplotlib") is None:
        raise MissingPlotsError('figures need matplotlib: pip install "fx_sparsity[plots]"')
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
