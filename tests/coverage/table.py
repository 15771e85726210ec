"""The coverage table: what `find_weights` claims, explains and misses, model by model."""

import math
from dataclasses import dataclass
from pathlib import Path

from fx_sparsity import find_weights
from fx_sparsity.graph.frontends import export_model
from fx_sparsity.graph.weight_map import Reason
from fx_sparsity.reports import format_table
from tests.coverage.architectures import NAMES, make
from tests.coverage.proof import Proof, Wrong

PATH = Path(__file__).parent / "architectures.txt"
HEADER = ("model", "family", "matrices", "weights", "explained", "unexplained", "wrong", "share")


@dataclass(frozen=True)
class Coverage:
    """One row.

    Attributes:
        name: of the architecture.
        weights: found, among the parameters of two or more dimensions.
        explained: dense for a reason that settles the matter.
        unexplained: FQNs that are dense for another reason.
        wrong: claims that execution refutes, in words.
        share: of all elements of all parameters that reach the outputs, those in weights.
    """

    name: str
    weights: int
    explained: int
    unexplained: tuple[str, ...]
    wrong: tuple[str, ...]
    share: float

    def cells(self):
        total = self.weights + self.explained + len(self.unexplained)
        counts = (total, self.weights, self.explained, len(self.unexplained), len(self.wrong))
        # Rounded down: a share that is shown as 99% is at least that.
        return (self.name, NAMES[self.name], *counts, f"{math.floor(self.share * 1000) / 10:.1f}%")


def measure(name):
    """Map one architecture and prove every claim."""
    model, args, kwargs = make(name)
    assert not (args and kwargs)
    program = export_model(model, kwargs or args)
    weights = find_weights(program)
    proof = Proof(program.module(), args, kwargs)
    wrong = []
    for site in weights.sites:
        try:
            proof.check(site)
        except Wrong as error:
            wrong.append(str(error))
    elements = sum(parameter.numel() for parameter in model.parameters()) - sum(
        math.prod(dense.shape) for dense in weights.dense if dense.reason is Reason.UNREACHABLE
    )
    return Coverage(
        name,
        weights=len(weights),
        explained=sum(u.reason.explained for u in weights.dense),
        unexplained=tuple(
            f"{u.fqn}: {u.reason} {u.detail}" for u in weights.dense if not u.reason.explained
        ),
        wrong=tuple(wrong),
        share=sum(math.prod(site.shape) for site in weights.sites) / elements,
    )


def render(rows):
    """The table as text."""
    return format_table(HEADER, [row.cells() for row in rows]) + "\n"
