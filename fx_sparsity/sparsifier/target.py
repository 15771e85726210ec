"""Where a masked tensor lives: every module and name that holds it, and the one mask over them."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.patterns import Pattern
from fx_sparsity.sparsifier.mask import GRAPH_MASKS, Mask
from fx_sparsity.sparsifier.plain_keys import refuse_plain_keys, take_plain_keys

Owners = dict[int, list[tuple[nn.Module, str]]]
"""Identity of a tensor -> every (module, attribute) that holds it."""


class MaskError(FxSparsityError, ValueError):
    """A tensor cannot be masked as asked; nothing was changed."""


class DetachedError(FxSparsityError, RuntimeError):
    """A sparsifier was copied or loaded without its model, and was asked to work on it."""


@dataclass
class Target:
    """One tensor under a mask.

    Attributes:
        name: FQN in the model, or the name given to `add_data`.
        owners: every (module, attribute) that holds the tensor; several where it is tied, none
            where the sparsifier is detached from its model.
        mask: shared by all owners.
        in_graph: the mask is applied by a node of the owning `GraphModule`, not by a
            parametrization.
        squashed: the zeros are baked in and the parametrization is gone.
        given: the mask came with a configuration; this sparsifier has not computed it yet.
        asked: pattern and level when the mask was last computed; a schedule may have moved on.
    """

    name: str
    owners: list[tuple[nn.Module, str]]
    mask: Mask
    in_graph: bool = False
    squashed: bool = False
    given: bool = False
    asked: tuple[Pattern, float] | None = None
    _followers: dict[tuple[int, str], list[str]] = field(default_factory=dict, repr=False)

    @property
    def original(self) -> Tensor:
        """The tensor beneath the mask.

        Raises:
            DetachedError: there is no model.
        """
        if not self.owners:
            raise DetachedError(f"{self.name}: detached from its model; `attach(model)` binds it")
        module, attribute = self.owners[0]
        if parametrize.is_parametrized(module, attribute):
            entry: Any = module.parametrizations
            return entry[attribute].original
        return getattr(module, attribute)

    @property
    def masked(self) -> Tensor:
        """The tensor as the model sees it."""
        original = self.original
        return original if self.squashed else self.mask(original)

    def attach(self) -> None:
        """Put the parametrization on every owner; all or none of them."""
        if self.in_graph:
            return
        done: list[tuple[nn.Module, str]] = []
        try:
            for module, attribute in self.owners:
                names = list(module._parameters)
                if attribute in names:
                    self._followers[id(module), attribute] = names[names.index(attribute) + 1 :]
                if getattr(module, "max_norm", None) is not None:
                    self.mask.watches = False  # it shortens what it looks up, each time anew
                parametrize.register_parametrization(module, attribute, self.mask)
                done.append((module, attribute))
                take_plain_keys(module)
        except BaseException:
            for module, attribute in done:
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
                refuse_plain_keys(module)
            raise

    def detach(self) -> None:
        """Take the parametrization off again; the original comes back untouched."""
        if self.in_graph or self.squashed:
            return
        for module, attribute in self.owners:
            if mask_on(module, attribute) is not self.mask:
                continue  # taken off through another sparsifier that shares it
            _give_own_class(module)
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            refuse_plain_keys(module)
            _put_before(module, attribute, self._followers.pop((id(module), attribute), []))

    def check_detachable(self) -> None:
        """Raise if something else parametrizes the tensor: taking the mask off would take it along.

        Raises:
            MaskError: naming the tensor and the other parametrizations.
            DetachedError: there is no model.
        """
        _ = self.original
        for module, attribute in [] if self.squashed or self.in_graph else self.owners:
            if mask_on(module, attribute) is not self.mask:
                continue  # taken off through another sparsifier that shares it
            entry: Any = module.parametrizations[attribute]  # type: ignore[index]
            others = [type(p).__name__ for p in entry if p is not self.mask]
            if others:
                raise MaskError(
                    f"{self.name} is parametrized by {', '.join(others)} besides its mask; "
                    "remove that first"
                )

    def squash(self) -> None:
        """Bake the zeros into the original, in place, and take the parametrization off.

        Where that is done already, training may have moved the zeros since: they are baked again.
        """
        self.mask.bake(self.original)
        self.detach()
        self.squashed = True


def _give_own_class(module: nn.Module) -> None:
    """Part a parametrized module from its copies.

    A deep copy shares the class that torch made for the module, whose property it deletes when a
    parametrization goes: the others could not be called any more.
    """
    made = type(module)
    module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))


def _put_before(module: nn.Module, attribute: str, followers: Sequence[str]) -> None:
    """Put a parameter back where it stood, before `followers`: torch registers it as the last.

    Optimizers know parameters by their order.
    """
    parameters = module._parameters
    names = [name for name in parameters if name != attribute]
    place = next((i for i, name in enumerate(names) if name in followers), len(names))
    for name in names[place:]:
        parameters[name] = parameters.pop(name)


def attach_all(targets: Sequence[Target]) -> None:
    """Attach every target, or none."""
    done: list[Target] = []
    try:
        for target in targets:
            target.attach()
            done.append(target)
    except BaseException:
        for target in done:
            target.detach()
        raise


def check_maskable(name: str, module: nn.Module, attribute: str) -> Tensor:
    """The tensor at `module.attribute`, once it is sure that a mask can go on it.

    Raises:
        MaskError: no such tensor, not floating, codes that stand for floats, parametrized already,
            or not held by the module.
    """
    if parametrize.is_parametrized(module, attribute):
        kinds = [type(p).__name__ for p in module.parametrizations[attribute]]  # type: ignore[index]
        raise MaskError(
            f"{name} is already parametrized by {', '.join(kinds)}; squash or remove that first"
        )
    tensor = getattr(module, attribute, None)
    if not isinstance(tensor, Tensor):
        raise MaskError(f"{name} is not a tensor, found {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise MaskError(f"{name} has dtype {tensor.dtype}; only floating weights can be masked")
    if _holds_codes(tensor):
        raise MaskError(
            f"{name} is codes, held by {type(tensor).__name__}. The codes of a model that is "
            "quantized already are masked by quantization.sparsify_codes"
        )
    if attribute not in module._parameters and attribute not in module._buffers:
        raise MaskError(
            f"{name}: expected a parameter or a buffer, found a tensor that "
            f"{type(module).__name__} computes, or holds as a plain attribute"
        )
    return tensor


def _holds_codes(tensor: Tensor) -> bool:
    """Whether a tensor of several, such as torchao's, has one that is no plain floats."""
    if not is_traceable_wrapper_subclass(tensor):
        return False
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]
    return any(not part.is_floating_point() or part.itemsize == 1 for part in parts)


def check_memory(model: nn.Module, masked: Mapping[int, str]) -> None:
    """Make sure that no masked tensor shares elements with another tensor of the model.

    Its zeros, once baked in, would show up in the other one, such as an embedding's transpose.

    Args:
        model: whose parameters and buffers are compared.
        masked: identity of a tensor -> its name.

    Raises:
        MaskError: naming the masked tensor and the other one.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout == torch.strided and tensor.numel():
            by_storage.setdefault(tensor.untyped_storage()._cdata, []).append((name, tensor))
    for held in by_storage.values():
        for (one, a), (other, b) in combinations(held, 2):
            if not masked.keys().isdisjoint((id(a), id(b))) and _overlap(a, b):
                name = masked.get(id(a)) or masked[id(b)]
                raise MaskError(
                    f"{name} shares memory with {other if id(a) in masked else one}, another "
                    "tensor, which its zeros would change; copy one of them, or make them the "
                    "same parameter"
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors over one storage have an element in common."""
    spans = []
    for tensor in (a, b):
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = tensor.element_size()
        start = tensor.storage_offset()
        spans.append((start * size, (start + last + 1) * size))
    (start_a, end_a), (start_b, end_b) = spans
    apart = end_a <= start_b or end_b <= start_a
    if apart or a.dtype != b.dtype:
        return not apart
    seen = torch.zeros(max(end_a, end_b) // a.element_size(), dtype=torch.bool)
    seen.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(seen.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def mask_on(module: nn.Module, attribute: str) -> Mask | None:
    """The mask that parametrizes `module.attribute`, if one does."""
    if not parametrize.is_parametrized(module, attribute):
        return None
    found = [p for p in module.parametrizations[attribute] if isinstance(p, Mask)]  # type: ignore[index]
    return found[0] if found else None


def graph_mask(model: nn.Module, fqn: str) -> Mask | None:
    """The mask over a GraphModule's own weight, if there is one.

    Where the GraphModule has been rebuilt since, its buffers hang on plain modules; a mask over the
    same tensors is put back in their place.
    """
    path = f"{GRAPH_MASKS}.{fqn}"
    try:
        holder = model.get_submodule(path)
    except AttributeError:
        return None
    if not isinstance(holder, Mask):
        holder = Mask(holder.get_buffer("mask"))
        model.set_submodule(path, holder)
    return holder


def owners_by_identity(model: nn.Module) -> Owners:
    """Every (module, attribute) of a model's parameters and buffers, grouped by tensor identity.

    A parametrized tensor is listed under the module and name that it is known by; one of several
    that a parametrization combines, as a weight norm does, under its own.
    """
    owners: Owners = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList) and module.is_tensor:
            continue
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, attribute))
        entries: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
        for attribute, entry in entries.items():
            if entry.is_tensor:  # a single original, as beneath a mask
                owners.setdefault(id(entry.original), []).append((module, attribute))
    return owners


class TensorState(MutableMapping[str, Any]):
    """What a sparsifier keeps about one tensor: its live mask under `"mask"`, and any counters.

    The mask is read through the mask module, so that it stays one and the same after `.to()` or
    `.half()` replaced the buffer; writing it copies in place, in the mask's own dtype.
    """

    def __init__(self, mask: Mask, counters: dict[str, Any] | None = None) -> None:
        self._mask = mask
        self.counters: dict[str, Any] = dict(counters or {})

    def __getitem__(self, key: str) -> Any:
        return self._mask.mask if key == "mask" else self.counters[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "mask":
            self.counters[key] = value
            return
        with torch.no_grad():
            self._mask.mask.copy_(value)

    def __delitem__(self, key: str) -> None:
        del self.counters[key]

    def __iter__(self) -> Iterator[str]:
        yield "mask"
        yield from self.counters

    def __len__(self) -> int:
        return 1 + len(self.counters)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorState):
            return NotImplemented
        same_mask = self["mask"].shape == other["mask"].shape and torch.equal(
            self["mask"], other["mask"].to(self["mask"].device)
        )
        return same_mask and self.counters == other.counters

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(dict(self))
