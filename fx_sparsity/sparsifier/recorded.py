"""The masks of a record, on a model again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fx_sparsity.sparsifier.base import BaseSparsifier
from fx_sparsity.sparsifier.record import MaskRecord, SparsityRecord
from fx_sparsity.sparsifier.target import MaskError


class RecordedMasks(BaseSparsifier):
    """Computes nothing: `step` gives each weight the mask that a record has for it.

    `fx_sparsity.prepare` without a mapping masks the weights that the record names.

    Args:
        record: of a model with the same weights, by any of their names.
    """

    def __init__(self, record: SparsityRecord) -> None:
        super().__init__()
        self.record = record

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise if the record has no mask for a weight of that name and shape.

        Raises:
            MaskError: the record is of another model.
        """
        found = self._of(name)
        if found.shape != shape:
            raise MaskError(
                f"{name}: the record has a mask of {_size(found.shape)}, the weight is "
                f"{_size(shape)}; give the record of this model"
            )

    def check_config(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> None:
        """See `BaseSparsifier.check_config`."""
        super().check_config(name, tensor, config)
        self.check_shape(name, tuple(tensor.shape))

    def update_mask(self, module: nn.Module, tensor_name: str, **config: Any) -> None:
        """See `BaseSparsifier.update_mask`."""
        del module, tensor_name
        name = config["tensor_fqn"]
        mask = self._target(name).mask
        mask.update(self._of(name).keep.to(mask.mask.device))

    def _of(self, name: str) -> MaskRecord:
        if name in self.record:
            return self.record[name]
        for weight in self.record.values():
            if name in weight.aliases:
                return weight
        raise MaskError(
            f"{name}: the record has no mask for it, but for {', '.join(self.record)}; give the "
            "record of this model"
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
