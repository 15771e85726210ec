"""A sparse layer that knows what it was."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fx_sparsity.graph.passes import SeenWeight
from fx_sparsity.kernels.linear import SparseLinear


@dataclass(frozen=True)
class OriginalModule:
    """The module in whose place a packed layer stands.

    Attributes:
        kind: of `layers.KINDS`.
        template: what that kind needs to build it again, without its tensors.
        tied: its weight, where another module holds it, too.
    """

    kind: str
    template: Any
    tied: nn.Parameter | None


class LoweredLinear(SparseLinear):
    """What `lower` puts into models.

    Attributes:
        original: None where it was no module, but a node of a graph.
        transposed: whether the model stored the weight, or what it saw of it, as [in, out].
        view: what a node saw of its weight; None where that was the weight itself.
    """

    original: OriginalModule | None = None
    transposed: bool = False
    view: SeenWeight | None = None
