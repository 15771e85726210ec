"""What `lower` puts into models: packed layers that know what they were."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fx_sparsity.graph.uses import SeenWeight
from fx_sparsity.kernels.linear import SparseLinear
from fx_sparsity.verification.stored import Forms


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


class ByTokens(Forms, nn.Module):
    """Calls of up to `limit` tokens go to the packed form, the others to the dense one.

    Both take part in `state_dict`. Under `torch.compile` the choice is a guard on the size of the
    batch, so that each side is compiled once. An exported graph has one side for good: the one of
    the example inputs, whose dynamic shapes have to lie on it.

    Args:
        dense: the layer as it was.
        packed: the same layer with its weight packed.
        limit: tokens, which are the product of all sizes of the activations but the last.
    """

    forms = ("dense", "packed")

    def __init__(self, dense: nn.Module, packed: LoweredLinear, limit: int) -> None:
        super().__init__()
        self.dense = dense
        self.packed = packed
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        tokens = 1
        for size in x.shape[:-1]:
            tokens *= size
        return self.packed(x) if tokens <= self.limit else self.dense(x)

    def extra_repr(self) -> str:
        """The limit between the forms."""
        return f"packed up to {self.limit} tokens"
