"""The data sparsifier: masks on named tensors and embeddings, without a model."""

import copy
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.sparsifier.core import SparsifierCore
from fx_sparsity.sparsifier.mask import Mask
from fx_sparsity.sparsifier.mask_state import Origin, load_entry, save_entry
from fx_sparsity.sparsifier.target import MaskError, Target, check_maskable

Data = Tensor | nn.Parameter | nn.Embedding | nn.EmbeddingBag


class _Container(nn.Module):
    """Gives bare tensors the module that parametrizations need; holds them, does not copy them."""


class BaseDataSparsifier(SparsifierCore):
    """Base class of every sparsifier that works on tensors. Override `update_mask`.

    Deep copies and pickles are independent of the original and work on.

    Args:
        data_list: (name, data) pairs; data as in `add_data`.
        defaults: configuration of every tensor that does not override it.

    Attributes:
        data_groups: name -> merged configuration.
    """

    def __init__(
        self, data_list: Iterable[tuple[str, Data]] | None = None, **defaults: Any
    ) -> None:
        super().__init__(defaults)
        self.data_groups: dict[str, dict[str, Any]] = {}
        self._container = _Container()
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
        tensor = self._extract_weight(data)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: expected a tensor, a parameter, an embedding or an embedding bag, "
                f"found {type(data).__name__}"
            )
        old = self._targets.get(name)
        merged = copy.deepcopy(self.defaults if old is None else self.data_groups[name])
        merged.update(config)
        mask = merged.pop("mask", None)
        if mask is None and old is not None and reuse_mask:
            mask = old.mask.mask
        if mask is not None and mask.shape != tensor.shape:
            raise MaskError(
                f"{name}: to retain the old mask, the shape of the new data must be the same: "
                f"expected {tuple(mask.shape)}, found {tuple(tensor.shape)}; "
                "or pass reuse_mask=False"
            )
        self._check(name, tensor)
        self.check_config(name, tensor, merged)
        if old is not None:
            warnings.warn(
                f"replacing existing data of the name {name!r}; did you mean another name?",
                stacklevel=2,
            )
            self._forget(name)
        first = Mask(torch.ones_like(tensor) if mask is None else mask)
        self._register(self._hold(name, tensor, first))
        self.data_groups[name] = merged
        return self.get_data(name, return_original=False)

    @torch.no_grad()
    def mask_for(self, name: str, tensor: Tensor, **config: Any) -> Tensor:
        """The mask that a step would give a tensor, which is not held: for more than fit in memory.

        Args:
            name: for messages, and for `update_mask`.
            tensor: floating; not changed.
            config: overrides the defaults.

        Returns:
            Boolean tensor of its shape: True is kept.

        Raises:
            ValueError: a tensor of that name is held, or this one cannot be ranked.
            MaskError: not floating.
        """
        if name in self._targets:
            raise ValueError(f"{name}: held under this name already")
        merged = copy.deepcopy(self.defaults) | config
        self._check(name, tensor)
        self.check_config(name, tensor, merged)
        holder = _Container()
        holder.register_buffer("data", tensor)
        target = Target(name, [(holder, "data")], Mask(torch.ones_like(tensor, dtype=torch.bool)))
        self._register(target)
        self.data_groups[name] = merged
        try:
            self.check_updates([name])
            self._update(name)
        finally:
            del self._targets[name], self.state[name], self.data_groups[name]
        return target.mask.mask

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

    def state_dict(self) -> dict[str, Any]:
        """Masks, configurations and data.

        Returns:
            `state`: name -> mask and counters; `data_groups`: name -> configuration; `_container`:
            the tensors themselves, not copied. Only plain types and tensors, so that
            `torch.load(weights_only=True)` reads it.
        """
        container = {}
        for name, target in self._targets.items():
            attribute = _attribute(name)
            key = attribute if target.squashed else f"parametrizations.{attribute}.original"
            container[key] = target.original
        return {
            "state": {name: save_entry(t, self.state[name]) for name, t in self._targets.items()},
            "data_groups": copy.deepcopy(self.data_groups),
            "_container": container,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Restore what `state_dict` saved, into a fresh or a used sparsifier.

        A tensor that is held under the same name, shape and dtype receives the values in place, so
        that whoever else holds it sees them; otherwise a copy is held.

        Args:
            state_dict: not changed, and not aliased afterwards.
            strict: what the sparsifier held before is dropped; False keeps the other names.

        Raises:
            ValueError: an entry without configuration or data, or with a mask that does not fit;
                nothing was changed.
        """
        loaded = list(_parse(state_dict))
        kept: dict[str, Tensor] = {}
        for name in self.names:
            if strict or name in state_dict["state"]:
                kept[name] = self.get_tensor(name)
                self._drop(name)
        for entry in loaded:
            tensor = kept.get(entry.name)
            if tensor is None or (tensor.shape, tensor.dtype) != (
                entry.data.shape,
                entry.data.dtype,
            ):
                tensor = entry.data.detach().clone()
                if isinstance(entry.data, nn.Parameter):
                    tensor = nn.Parameter(tensor, entry.data.requires_grad)
            else:
                with torch.no_grad():
                    tensor.copy_(entry.data)
            self._hold_entry(entry, tensor)

    def _extract_weight(self, data: Data) -> Tensor:
        return data.weight if isinstance(data, nn.Embedding | nn.EmbeddingBag) else data

    def _check(self, name: str, tensor: Tensor) -> None:
        probe = _Container()
        probe.register_buffer("data", tensor)
        check_maskable(name, probe, "data")

    def _hold(self, target_name: str, tensor: Tensor, mask: Mask, squashed: bool = False) -> Target:
        attribute = _attribute(target_name)
        # As a buffer: registering a parameter would give the container its own copy.
        self._container.register_buffer(attribute, tensor)
        target = Target(target_name, [(self._container, attribute)], mask, squashed=squashed)
        if not squashed:
            target.attach()
        return target

    def _hold_entry(self, entry: "_Entry", tensor: Tensor) -> None:
        target = self._hold(entry.name, tensor, Mask(entry.mask.to(tensor.device)), entry.squashed)
        target.given, target.asked = entry.origin
        self._register(target, entry.counters)
        self.data_groups[entry.name] = copy.deepcopy(entry.config)

    def _forget(self, name: str) -> None:
        super()._forget(name)
        delattr(self._container, _attribute(name))

    def _drop(self, name: str) -> None:
        self._forget(name)
        del self.data_groups[name]

    def _update(self, name: str) -> None:
        self.update_mask(name, self.get_data(name), **self._arguments(name))

    def __getstate__(self) -> dict[str, Any]:
        bound = ("_container", "_targets", "state", "data_groups")
        attributes = {key: value for key, value in self.__dict__.items() if key not in bound}
        return {"attributes": attributes, "state_dict": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["attributes"])
        self._container, self._targets = _Container(), {}
        self.state, self.data_groups = {}, {}
        for entry in _parse(state["state_dict"]):
            self._hold_entry(entry, entry.data)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for name, config in self.data_groups.items():
            lines += ["\tData Group", f"\t    name: {name}"]
            lines += [f"\t    {key}: {config[key]}" for key in sorted(config)]
        return "\n".join([*lines, ")"])


@dataclass(frozen=True)
class _Entry:
    """One tensor of a state dict."""

    name: str
    data: Tensor
    config: dict[str, Any]
    mask: Tensor
    squashed: bool
    counters: dict[str, Any]
    origin: Origin


def _parse(state_dict: Mapping[str, Any]) -> Iterator[_Entry]:
    """The entries of a state dict, each complete.

    Raises:
        ValueError: an entry without configuration or data, or with a mask that does not fit.
    """
    container = state_dict["_container"]
    for name, saved in state_dict["state"].items():
        attribute = _attribute(name)
        data = container.get(f"parametrizations.{attribute}.original", container.get(attribute))
        config = state_dict["data_groups"].get(name)
        if data is None or config is None:
            what = "data" if data is None else "configuration"
            raise ValueError(f"error loading {name}: the state has no {what} for it")
        if not data.is_floating_point():
            raise ValueError(f"error loading {name}: expected floating data, found {data.dtype}")
        mask, _, counters, origin = load_entry(saved)
        mask = torch.ones_like(data) if mask is None else mask
        if mask.shape != data.shape:
            raise ValueError(
                f"error loading {name}: expected a mask of shape {tuple(data.shape)}, "
                f"found {tuple(mask.shape)}"
            )
        yield _Entry(name, data, config, mask, attribute in container, counters, origin)


_TAKEN = frozenset(dir(nn.Module())) | frozenset(dir(nn.ModuleDict()))


def _attribute(name: str) -> str:
    """The container's attribute for a name: itself, or an encoding where it could not be one."""
    if name and "." not in name and name not in _TAKEN and not name.startswith(("hex:", "_")):
        return name
    return f"hex:{name.encode().hex()}"
