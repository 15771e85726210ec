"""What weights take, by measures that later parts of the package register."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fx_sparsity.graph.weight_map import WeightSite


class StoredBytes(Protocol):
    """Bytes of a tensor in a file."""

    def __call__(self, tensor: Tensor) -> int:
        """Of one tensor of the model's state, without the file's header."""


class LayerTime(Protocol):
    """Milliseconds of a call of the layer that a weight belongs to."""

    def __call__(
        self, site: WeightSite, values: Sequence[Tensor], tokens: int, model_bytes: int
    ) -> list[float] | None:
        """With each of several values as the weight.

        Args:
            site: of the weight.
            values: of its shape; the first is dense.
            tokens: rows of activations in a call.
            model_bytes: of all weights of the model.

        Returns:
            None where that cannot be told of this weight.
        """


class Costs:
    """The measures there are.

    Attributes:
        stored_bytes: that of `storage`.
        layer_time: that of `lowering`.
    """

    stored_bytes: StoredBytes
    layer_time: LayerTime


COSTS = Costs()
