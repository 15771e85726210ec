"""The model-bound sparsifier: masks on the weights of a model, named by FQN."""

import copy
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_sparsity.patterns import Rows
from fx_sparsity.sparsifier.adapters import guard_merge
from fx_sparsity.sparsifier.averaging import follow_masks
from fx_sparsity.sparsifier.core import SparsifierCore
from fx_sparsity.sparsifier.hub import guard, unguard
from fx_sparsity.sparsifier.mask import Mask
from fx_sparsity.sparsifier.mask_state import Origin, load_entry, save_entry
from fx_sparsity.sparsifier.placement import (
    MASKED,
    OF_ONE_MODEL,
    Placement,
    check_divisor,
    check_shape,
    merge_group,
    tensor_and_mask,
    tensor_of,
    weights_of,
)
from fx_sparsity.sparsifier.ranks import RankCheck, note_parallel
from fx_sparsity.sparsifier.registration import on_registration
from fx_sparsity.sparsifier.target import (
    MaskError,
    Owners,
    Target,
    attach_all,
    check_maskable,
    check_memory,
    graph_mask,
    mask_on,
    owners_by_identity,
)
from fx_sparsity.sparsifier.utils import (
    get_arg_info_from_tensor_fqn,
    module_contains_param,
    swap_module,
)

_Entry = tuple[Tensor, bool, dict[str, Any], Origin]
"""What is kept of one weight: its mask, whether it is squashed, and counters."""


def _reduces_gradients(module: nn.Module) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel)


class BaseSparsifier(SparsifierCore):
    """Base class of every sparsifier that works on a model. Override `update_mask`.

    A deep copy made together with its model, `deepcopy((model, sparsifier))`, is bound to the copy.
    Copied or unpickled alone it is detached until `attach(model)`.

    Args:
        defaults: configuration of every weight; an entry given to `prepare` overrides it.

    Attributes:
        groups: one dict for each masked weight: the merged configuration, and `module`,
            `module_fqn`, `tensor_name`, `tensor_fqn`.
        model: what `prepare` was given; None while detached.
        config: what `make_config_from_model` made.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None) -> None:
        super().__init__(defaults)
        self.groups: list[dict[str, Any]] = []
        self.model: nn.Module | None = None
        self.config: list[dict[str, Any]] = []
        self._ranks = RankCheck()

    def step(self, use_path: bool = True) -> None:
        """Recompute every mask that is not squashed yet.

        In a model that `DistributedDataParallel` was put around, every rank does so by itself, and
        the masks of the step before are compared with the other ranks'.

        Whatever is raised, every mask is as it was.

        Args:
            use_path: of no effect, as in `torch.ao.pruning`.

        Raises:
            ValueError: a tensor cannot be ranked (NaN), or has no data yet (meta device); it is
                named.
            MaskError: the masks of the step before differ between ranks.
            DetachedError: the sparsifier has no model.
        """
        self._ranks.check(self.model)
        super().step(use_path)
        self._ranks.tell(self.model, {name: self.get_mask(name) for name in self.names})

    @abstractmethod
    def update_mask(self, module: nn.Module, tensor_name: str, **config: Any) -> None:
        """Compute the mask of `module.tensor_name` and write it, in place.

        Args:
            module: owner of the weight.
            tensor_name: the weight's attribute on it.
            config: the rest of the group: `tensor_fqn`, `module_fqn` and the configuration.
        """

    def prepare(self, model: nn.Module, config: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Put a mask, all ones, on weights of `model`, in place.

        A tied weight is masked once, by one mask on every module that holds it. A weight that is
        masked already keeps its mask, which this sparsifier then updates; its configuration is
        the new one.

        Args:
            model: modified in place; nothing is changed where this raises.
            config: dicts with a `tensor_fqn` and whatever overrides the defaults. A `mask` entry
                gives the first mask and its dtype (`ones_like` the weight otherwise). None takes
                what `make_config_from_model` does.

        Raises:
            MaskError: a weight that does not exist, is not floating, is parametrized by something
                else, shares memory with another tensor, or is listed twice; it is named.
        """
        if config is None:
            self.make_config_from_model(model)
            config = self.config
        self.place_masks(model, list(self.plan_masks(model, config).values()))

    def make_config_from_model(
        self, model: nn.Module, SUPPORTED_MODULES: Collection[type[nn.Module]] = MASKED
    ) -> None:
        """Choose what `prepare` masks where it gets no configuration, and set `config` to it.

        Args:
            model: not changed.
            SUPPORTED_MODULES: classes whose weights are taken; those of every linear, embedding,
                convolution and attention module by default.
        """
        self.config = [{"tensor_fqn": fqn} for fqn in weights_of(model, SUPPORTED_MODULES)]

    def plan_masks(
        self, model: nn.Module, config: Sequence[Mapping[str, Any]]
    ) -> dict[str, Placement]:
        """What `prepare` would do, checked, for `place_masks` to do at once or weight by weight.

        Args:
            model: not changed.
            config: as `prepare` takes it.

        Returns:
            FQN -> placement, in order.

        Raises:
            MaskError: as `prepare`.
        """
        if self.model is not None and self.model is not model and self._targets:
            raise MaskError(
                f"the sparsifier is bound to another {type(self.model).__name__}; "
                "prepare this model with a fresh one"
            )
        owners = owners_by_identity(model)
        parallel = next(filter(_reduces_gradients, model.modules()), None)
        planned: dict[str, Placement] = {}
        seen: dict[int, str] = {}
        for entry in config:
            group = merge_group(model, self.defaults, entry)
            name, first = group["tensor_fqn"], group.pop("mask", None)
            in_graph: Mask | None = group.pop("mask_module", None)
            tensor, present = tensor_and_mask(group, in_graph)
            if id(tensor) in seen:
                raise MaskError(
                    f"{name} is the same tensor as {seen[id(tensor)]}; list one of them"
                )
            seen[id(tensor)] = name
            self._check_entry(name, tensor, group, first)
            if parallel is not None and present is None:
                raise MaskError(
                    f"{name} is in a {type(parallel).__name__} already, which knows its parameters "
                    "by name: put the masks on first, then wrap the model"
                )
            mask = present or self.new_mask(torch.ones_like(tensor) if first is None else first)
            target = Target(name, owners[id(tensor)], mask, in_graph is not None)
            planned[name] = Placement(group, target, present is None, first)
        for placement in planned.values():
            for module, attribute in placement.target.owners:
                if mask_on(module, attribute) is None:
                    check_maskable(placement.target.name, module, attribute)
        check_memory(model, seen)
        return planned

    def new_mask(self, mask: Tensor) -> Mask:
        """A mask to put on a weight; the place to put on one of another class.

        Args:
            mask: see `Mask`.
        """
        return Mask(mask)

    def _check_entry(
        self, name: str, tensor: Tensor, group: Mapping[str, Any], first: Tensor | None
    ) -> None:
        """Raise if a tensor cannot have its first mask, or not the masks that its group leads to.

        Raises:
            MaskError: naming the tensor.
        """
        if first is not None:
            check_shape(name, tensor, first)
        self.check_config(name, tensor, group)
        wanted = self.pattern_of(group)
        if wanted is not None and isinstance(wanted[0], Rows):
            check_divisor(name)

    def place_masks(self, model: nn.Module, placements: Sequence[Placement]) -> None:
        """Put masks on as `plan_masks` has laid down.

        Args:
            model: that was planned for, as it was then but for what has been placed since.
            placements: of different weights.
        """
        attach_all([placement.target for placement in placements if placement.fresh])
        for _, target, fresh, first in placements:
            if fresh:
                target.given = first is not None and not bool(first.all())
            elif first is not None:
                target.mask.update(first)
            counters = self.state[target.name].counters if target.name in self.state else None
            self._register(target, counters)
        names = {placement.target.name for placement in placements}
        self.groups = [g for g in self.groups if g["tensor_fqn"] not in names]
        self.groups += [placement.group for placement in placements]
        self._live_in(model)

    def attach(self, model: nn.Module) -> None:
        """Bind a detached sparsifier to a model that has its weights.

        A weight that is masked already, as in a deep copy of the prepared model, keeps its mask
        module and receives this sparsifier's mask; the others get a parametrization.

        Args:
            model: modified in place; nothing is changed where this raises.

        Raises:
            MaskError: the sparsifier has a model, or a weight is missing or does not fit.
        """
        if self.model is not None:
            raise MaskError("the sparsifier is bound to a model already; copy it to bind the copy")
        entries = {
            name: (
                target.mask.mask,
                target.squashed,
                self.state[name].counters,
                Origin(target.given, target.asked),
            )
            for name, target in self._targets.items()
        }
        self._bind(model, self.groups, entries)

    def config_of(self, name: str) -> dict[str, Any]:
        """See `SparsifierCore.config_of`."""
        self._target(name)
        return next(group for group in self.groups if group["tensor_fqn"] == name)

    def name_of(self, module: nn.Module, tensor_name: str) -> str:
        """FQN of a masked weight, by what `update_mask` is given.

        Raises:
            ValueError: this sparsifier masks no such weight.
        """
        for group in self.groups:
            if group.get("module") is module and group["tensor_name"] == tensor_name:
                return str(group["tensor_fqn"])
        raise ValueError(f"no mask of this sparsifier is on {tensor_name} of {module}")

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """See `SparsifierCore.aliases`."""
        if self.model is None:
            return {}
        names: dict[int, list[str]] = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(prefix)
        return {
            name: tuple(
                alias
                for module, attribute in target.owners
                for prefix in names.get(id(module), [])
                if (alias := f"{prefix}.{attribute}".removeprefix(".")) != name
            )
            for name, target in self._targets.items()
        }

    def squash_mask(
        self,
        params_to_keep: Sequence[str] | None = None,
        params_to_keep_per_layer: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Bake every mask into its weight and take the parametrization off.

        Args:
            params_to_keep: keys of a group to leave on its module, in a dict `sparse_params`.
            params_to_keep_per_layer: the same for single modules, by module FQN.

        Raises:
            KeyError: a key that a group does not have; nothing was squashed.
            MaskError: a weight that something else parametrizes too, or masks that differ between
                the ranks of a data-parallel model; nothing was squashed.
            DetachedError: the sparsifier has no model.
        """
        self._ranks.check(self.model)
        kept: list[tuple[nn.Module, dict[str, Any]]] = []
        for group in self.groups:
            self.get_tensor(group["tensor_fqn"])
            keys = [
                *(params_to_keep or ()),
                *(params_to_keep_per_layer or {}).get(group["module_fqn"], ()),
            ]
            if keys:
                kept.append((group["module"], {key: group[key] for key in keys}))
        self._squash(self._targets)
        if self.model is not None:
            unguard(self.model)
        for module, params in kept:
            module.sparse_params = params  # type: ignore[assignment]

    def remove_masks(self) -> None:
        """Take every mask off without applying it, and let go of the model: `prepare` undone.

        Raises:
            MaskError: zeros are baked in already, and cannot be undone; nothing was changed.
        """
        baked = [name for name, target in self._targets.items() if target.squashed]
        if baked:
            raise MaskError(f"{baked[0]}: its mask is squashed, the original no longer exists")
        for name in self.names:
            self._forget(name)
        if self.model is not None:
            unguard(self.model)
        self.groups, self.model = [], None

    def convert(
        self,
        module: nn.Module,
        mapping: Mapping[type[nn.Module], Any] | None = None,
        inplace: bool = False,
        parameterization: type[nn.Module] = Mask,
    ) -> nn.Module:
        """Swap every masked submodule whose class is in `mapping` for a sparse one.

        Args:
            module: its submodules are looked at; not changed unless `inplace`.
            mapping: module class -> class whose `from_dense(module)` makes the replacement.
            inplace: change `module` itself.
            parameterization: which parametrization marks a masked module.

        Returns:
            `module` or its changed copy.

        Raises:
            ValueError: no mapping given.
        """
        if mapping is None:
            raise ValueError(
                "mapping: expected {module class: class with `from_dense`}, found None"
            )
        if not inplace:
            module = copy.deepcopy(module)
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if module_contains_param(child, parameterization):
                    setattr(parent, name, swap_module(child, mapping))
        return module

    def state_dict(self) -> dict[str, Any]:
        """Masks and configurations; the weights themselves are in the model's own state.

        Returns:
            `state`: FQN -> mask and counters; `groups`: the configurations. Only plain types and
            tensors, so that `torch.load(weights_only=True)` reads it.
        """
        return {
            "state": {name: save_entry(t, self.state[name]) for name, t in self._targets.items()},
            "groups": copy.deepcopy(
                [{k: v for k, v in g.items() if k not in OF_ONE_MODEL} for g in self.groups]
            ),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Restore what `state_dict` saved.

        Bound to a model, the masks go on its weights; otherwise they wait for `attach`.

        Args:
            state_dict: not changed, and not aliased afterwards.
            strict: weights that the state does not name lose their masks, and every named weight
                must exist. False keeps the former and passes over names that the model lacks.

        Raises:
            MaskError: a weight is missing or does not fit its mask; nothing was changed.
        """
        groups = {group["tensor_fqn"]: dict(group) for group in copy.deepcopy(state_dict["groups"])}
        entries = {}
        for name, entry in state_dict["state"].items():
            mask, squashed, counters, origin = load_entry(entry)
            if mask is None or name not in groups:
                what = "mask" if mask is None else "group"
                raise MaskError(f"error loading {name}: the state has no {what} for it")
            entries[name] = (mask, squashed, copy.deepcopy(counters), origin)
        if not strict:
            for name, target in self._targets.items():
                if name not in entries:
                    counters = self.state[name].counters
                    origin = Origin(target.given, target.asked)
                    entries[name] = (target.mask.mask, target.squashed, counters, origin)
                    groups[name] = self.config_of(name)
            if self.model is not None:
                held = self.model
                entries = {n: e for n, e in entries.items() if tensor_of(held, n) is not None}
        ordered = [groups[name] for name in entries]
        if self.model is not None:
            self._bind(self.model, ordered, entries)
            return
        if absent := [name for name, (mask, *_) in entries.items() if mask.is_meta]:
            raise MaskError(
                f"error loading {absent[0]}: its mask has no data, it is on the meta device"
            )
        self._targets, self.state, self.groups = {}, {}, ordered
        for name, (mask, squashed, counters, origin) in entries.items():
            target = Target(name, [], self.new_mask(mask), squashed=squashed)
            target.given, target.asked = origin
            self._register(target, counters)

    def _bind(
        self, model: nn.Module, groups: Sequence[Mapping[str, Any]], entries: Mapping[str, _Entry]
    ) -> None:
        """Make `model` and this sparsifier hold exactly these masks."""
        owners = owners_by_identity(model)
        found = {
            name: self._find_target(model, owners, name, mask, squashed)
            for name, (mask, squashed, *_) in entries.items()
        }
        attach_all([target for target, fresh in found.values() if fresh])
        for name in [name for name in self._targets if name not in entries]:
            self._forget(name)
        self._targets, self.state = {}, {}
        for name, (target, _) in found.items():
            mask, squashed, counters, (target.given, target.asked) = entries[name]
            target.mask.restore(mask)
            if squashed and not target.squashed:
                target.squash()
            self._register(target, counters)
        self.groups = [
            {**group, **get_arg_info_from_tensor_fqn(model, group["tensor_fqn"])}
            for group in groups
        ]
        self._live_in(model)

    def _live_in(self, model: nn.Module) -> None:
        """Take a model whose masks are on, and see to what would not go well with them."""
        self.model = model
        guard(model, self)
        for handler in (guard_merge, note_parallel, follow_masks):
            on_registration(handler)

    def _find_target(
        self, model: nn.Module, owners: Owners, name: str, mask: Tensor, squashed: bool
    ) -> tuple[Target, bool]:
        """The weight that a saved mask belongs to, and whether its mask is still to be put on.

        Raises:
            MaskError: there is none, or none that the mask fits.
        """
        info = get_arg_info_from_tensor_fqn(model, name)
        tensor = tensor_of(model, name)
        if tensor is None:
            raise MaskError(f"error loading {name}: the model has no such tensor")
        check_shape(name, tensor, mask)
        if mask.is_meta:
            raise MaskError(f"error loading {name}: its mask has no data, it is on the meta device")
        held_by = owners[id(tensor)]
        if (in_graph := self._mask_in_graph(model, name)) is not None:
            return Target(name, held_by, in_graph, in_graph=True), False
        if name in self._targets and self._targets[name].in_graph and not squashed:
            raise MaskError(
                f"error loading {name}: the graph no longer selects through a mask; "
                "call prepare on it first"
            )
        if (present := mask_on(info["module"], info["tensor_name"])) is not None:
            return Target(name, held_by, present), False
        if not squashed:
            check_maskable(name, info["module"], info["tensor_name"])
        new = self.new_mask(mask.detach().clone().to(tensor.device))
        return Target(name, held_by, new, squashed=squashed), not squashed

    def _mask_in_graph(self, model: nn.Module, name: str) -> Mask | None:
        """The mask through which a graph selects from a weight, if one does."""
        held = self._targets.get(name)
        # The graph of a backend is no part of the model, which knows nothing of its masks.
        elsewhere = model is self.model and not isinstance(model, fx.GraphModule)
        if elsewhere and held is not None and held.in_graph:
            return held.mask
        return graph_mask(model, name)

    def _update(self, name: str) -> None:
        self.update_mask(**self._arguments(name))

    def __getstate__(self) -> dict[str, Any]:
        bound = ("model", "groups", "_targets", "state")
        attributes = {key: value for key, value in self.__dict__.items() if key not in bound}
        return {"attributes": attributes, "state_dict": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["attributes"])
        self.model, self.groups, self._targets, self.state = None, [], {}, {}
        self.load_state_dict(state["state_dict"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "BaseSparsifier":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = memo.get(id(self.model))
        # A model that holds its own sparsifier is not whole yet when the sparsifier is copied.
        if model is not None and "_modules" in vars(model):
            copied.attach(model)
        return copied

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.groups):
            lines += [f"\tGroup {i}", f"\t    module: {group.get('module')}"]
            lines += [f"\t    {key}: {group[key]}" for key in sorted(group) if key != "module"]
        return "\n".join([*lines, ")"])
