import io
import sys

import pytest
import torch

from fx_sparsity.pruning.report import PrunedWeight, PruningReport
from fx_sparsity.pruning.sparsity_plan import Front, Point, SparsityPlan
from fx_sparsity.reporting import density_of
from fx_sparsity.reporting.figures import (
    MissingPlotsError,
    plot_density,
    plot_front,
    plot_layers,
)

ROWS = tuple(
    PrunedWeight(f"{i}.w", "2:4", 0.5, 9, error, 0.1) for i, error in enumerate([0.1, None])
)
REPORT = PruningReport(ROWS, {}, True, "1 graph", 1, 0, 0, 0.1)
POINTS = (Point({"w": None}, 0.0, 900, None, 1.0), Point({"w": "2:4"}, 0.2, 500, None))
PLAN = SparsityPlan((), {}, POINTS[0], POINTS[0], Front(POINTS), "loss", 1, (), 0.1)


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer)
    assert buffer.getvalue().startswith(b"\x89PNG")
    return figure


def test_figures_show_the_numbers_of_the_reports():
    levels, errors = drawn(plot_layers(REPORT)).axes
    assert [patch.get_height() for patch in levels.patches] == [50, 50]
    assert errors.lines[0].get_xydata().tolist() == [[0, 0.1]]
    effects, scores = drawn(plot_front(PLAN)).axes
    assert effects.lines[0].get_xydata().tolist() == [[900 / 1e6, 0.0], [500 / 1e6, 0.2]]
    assert scores.lines[0].get_xydata().tolist() == [[900 / 1e6, 1.0]]
    zero = torch.eye(8).bool()
    corner, overview = drawn(plot_density(density_of(zero), "w")).axes
    assert (torch.from_numpy(corner.images[0].get_array().data) == ~zero).all()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPlotsError, match=r'pip install "fx_sparsity\[plots\]"'):
        plot_layers(REPORT)
