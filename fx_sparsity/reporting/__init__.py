"""What became of a model, to look at: one HTML file, and figures."""

from fx_sparsity.reporting.density import Densities, Density, densities, density_of
from fx_sparsity.reporting.facts import DENSE, Change, Compared, Facts, Section, facts
from fx_sparsity.reporting.page import write_html
from fx_sparsity.reports import Bytes, Share

__all__ = [
    "DENSE",
    "Bytes",
    "Change",
    "Compared",
    "Densities",
    "Density",
    "Facts",
    "Section",
    "Share",
    "densities",
    "density_of",
    "facts",
    "write_html",
]
