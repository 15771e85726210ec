"""A layer that keeps both forms, and chooses by the size of the batch."""

from torch import Tensor, nn

from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.verification.stored import Forms


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
        """Where the forms meet."""
        return f"packed up to {self.limit} tokens"
