"""The data sparsifier: masks on named tensors and embeddings, without a model."""

import copy
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fx_sparsity.sparsifier.core import SparsifierCore
from fx_sparsity.sparsifier.mask import Mask
from fx_sparsity.sparsifier.target import MaskError, Target, check_maskable

Data = Tensor | nn.Parameter | nn.Embedding | nn.EmbeddingBag


class _Holder(nn.Module):
    """Gives a bare tensor the module that a parametrization needs; holds it, does not copy it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("data", tensor)


class BaseDataSparsifier(SparsifierCore):
    """Base class of every sparsifier that works on tensors. Override `update_mask`.

    Args:
        data_list: (name, data) pairs; data as in `add_data`.
        defaults: configuration of every tensor that does not override it.

    Attributes:
        data_groups: name -> merged configuration.
    """

    def __init__(self, data_list: Iterable[tuple[str, Data]] | None = None, **defaults: Any):
        super().__init__(defaults)
        self.data_groups: dict[str, dict[str, Any]] = {}
        for name, data in data_list or ():
            self.add_data(name, data)

    @abstractmethod
    def update_mask(self, name: str, data: Tensor, **config: Any) -> None:
        """Compute the mask of one tensor and write it, in place (see `get_mask`).

        Args:
            name: the name given to `add_data`.
            data: the tensor beneath the mask.
            config: its configuration.
        """

    def add_data(self, name: str, data: Data, reuse_mask: bool = True, **config: Any) -> Tensor:
        """Put a tensor under a mask of ones, or replace the one of that name.

        Args:
            name: any string.
            data: a tensor or parameter; of an embedding or embedding bag the weight is taken. The
                tensor itself is held, so changes made outside are seen.
            reuse_mask: when replacing, keep the old mask.
            config: overrides the defaults; when replacing, the old configuration. `mask` gives the
                first mask.

        Returns:
            The masked tensor.

        Raises:
            TypeError: data of another type.
            MaskError: not floating, or the old mask does not fit; nothing was changed.
        """
        tensor = data.weight if isinstance(data, nn.Embedding | nn.EmbeddingBag) else data
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: expected a tensor, a parameter, an embedding or an embedding bag, "
                f"found {type(data).__name__}"
            )
        old = self._targets.get(name)
        merged = {**copy.deepcopy(self.defaults if old is None else self.data_groups[name])}
        merged.update(config)
        mask = merged.pop("mask", None)
        if mask is None:
            mask = (
                old.mask.mask if old is not None and reuse_mask else tensor.new_ones(tensor.shape)
            )
        if mask.shape != tensor.shape:
            raise MaskError(
                f"{name}: to retain the old mask, the shape of the new data must be the same: "
                f"expected {tuple(mask.shape)}, found {tuple(tensor.shape)}; "
                "or pass reuse_mask=False"
            )
        holder = _Holder(tensor)
        check_maskable(name, holder, "data")
        self.check_config(name, tensor, merged)
        if old is not None:
            warnings.warn(
                f"replacing existing data of the name {name!r}; did you mean another name?",
                stacklevel=2,
            )
            old.detach()
        self._add([Target(name, [(holder, "data")], Mask(mask))])
        self.data_groups[name] = merged
        return self.get_data(name, return_original=False)

    def config_of(self, name: str) -> dict[str, Any]:
        """See `SparsifierCore.config_of`."""
        self._target(name)
        return self.data_groups[name]

    def squash_mask(
        self, names: Iterable[str] | None = None, leave_parametrized: bool = True
    ) -> None:
        """Bake masks into their tensors, which are no longer parametrized afterwards.

        Args:
            names: which; all by default.
            leave_parametrized: False takes the mask off without applying it.

        Raises:
            ValueError: an unknown name; nothing was squashed.
        """
        targets = [self._target(name) for name in (self.names if names is None else names)]
        for target in targets:
            if leave_parametrized:
                target.squash()
            elif not target.squashed:
                target.detach()
                target.squashed = True

    def _update(self, name: str) -> None:
        self.update_mask(name, self.get_data(name), **self.data_groups[name])

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for name, config in self.data_groups.items():
            lines += ["\tData Group", f"\t    name: {name}"]
            lines += [f"\t    {key}: {config[key]}" for key in sorted(config)]
        return "\n".join([*lines, ")"])
