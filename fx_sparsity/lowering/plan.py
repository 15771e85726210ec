"""What is going to become of each layer, before anything is replaced; and the rows that tell it."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fx_sparsity.graph import WeightMap, WeightSite
from fx_sparsity.lowering.dense_tables import DenseTable, Lookup
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.lowering.places import Place
from fx_sparsity.lowering.policy import Choice, Policy
from fx_sparsity.lowering.report import LoweredWeight
from fx_sparsity.masks.detect import tightest_pattern
from fx_sparsity.patterns import Role
from fx_sparsity.verification.gate import read_weights
from fx_sparsity.verification.stored import StoredWeight

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """What becomes of one layer.

    Attributes:
        place: where it is.
        layer: as it is; None where it cannot be read.
        choice: which kernel, or why none.
    """

    place: Place
    layer: DenseLinear | DenseTable | None
    choice: Choice


def choose(
    places: Sequence[Place],
    rules: Policy,
    tokens: tuple[int, ...] | None = None,
    keep_dense: bool = False,
) -> list[Planned]:
    """What becomes of each layer; what was measured for it is kept on disk.

    Raises:
        LoweringError: a packing was asked for by name that a weight cannot have.
    """
    layers = {place: place.look() for place in places}
    total = sum(layer.nbytes for layer in layers.values() if not isinstance(layer, str))
    planned = []
    for place, layer in layers.items():
        rule, reason = rules.rule(place.names, place.owner)
        if isinstance(layer, str):
            planned.append(Planned(place, None, Choice(None, reason=place.obstacle or layer)))
            continue
        choice = Choice(None, reason=place.against(layer) or reason)
        if rule is not None and not place.against(layer):
            dtype = min(place.dtypes, key=str) if place.dtypes else layer.input_dtype
            choice = rules.choose(
                place.fqn,
                layer,
                rule,
                tokens=tokens or tuple(sorted(place.tokens)) or (1,),
                input_dtype=dtype,
                model_bytes=total,
                keep_dense=keep_dense,
            )
        _log.info("%s: %s", place.fqn, choice.packing or choice.reason)
        planned.append(Planned(place, layer, choice))
    rules.save()
    return planned


def pack_all(planned: Iterable[Planned]) -> dict[Place, LoweredLinear | Lookup]:
    """The packed form of each layer that gets one; what sees the same of one weight shares it."""
    packed: dict[Place, LoweredLinear | Lookup] = {}
    first: dict[tuple[object, ...], Any] = {}
    for plan in planned:
        if plan.layer is not None and plan.choice.packing is not None:
            place, layer = plan.place, plan.layer
            seen = layer.norms if isinstance(layer, DenseTable) else (place.transposed, place.view)
            key = id(place.tensor), seen, plan.choice.packing
            new = plan.choice.packed
            if new is None or key in first:
                new = layer.pack(plan.choice.packing, first.get(key))
            packed[place] = first[key] = new
            if isinstance(new, LoweredLinear):
                new.transposed, new.view = place.transposed, place.view
    return packed


def ties(planned: Iterable[Planned], weights: WeightMap) -> Iterator[str]:
    """What becomes of tied weights that are lowered, in words.

    Args:
        planned: the layers.
        weights: what discovery knows of their model.
    """
    packing = {n: p.choice.packing for p in planned for n in p.place.names}
    for site in weights.sites:
        forms: dict[str | None, list[str]] = {}
        for name in site.names:
            forms.setdefault(packing.get(name), []).append(name)
        if len(forms) > 1:
            parts = [f"{', '.join(names)} {form or 'dense'}" for form, names in forms.items()]
            yield f"tied, each in a form of its own: {'; '.join(parts)}"
        elif None not in forms and site.aliases:
            yield f"tied, sharing what was packed: {site.fqn}, {', '.join(site.aliases)}"


def multiplied_as_floats(planned: Iterable[Planned]) -> Iterator[str]:
    """What lowering takes from layers whose activations are codes, in words."""
    names = [
        plan.place.fqn
        for plan in planned
        if plan.choice.packing is not None
        and isinstance(layer := plan.layer, DenseLinear)
        and layer.from_codes
        and layer.scale is not None
    ]
    if names:
        yield (
            "the graph quantizes their activations, and kernels take what codes stand for; lost "
            f"are Inductor's int8 products and what it fuses with them: {', '.join(names)}"
        )


class Bytes:
    """Bytes that count once, however many rows speak of them."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def once(self, identity: int, nbytes: int) -> int:
        """`nbytes` for an identity that is new, else 0."""
        if identity in self._seen:
            return 0
        self._seen.add(identity)
        return nbytes


def layer_rows(
    planned: Sequence[Planned],
    packed: Mapping[Any, LoweredLinear | Lookup],
    before: Bytes,
    after: Bytes,
) -> list[LoweredWeight]:
    """A row for every layer.

    Args:
        planned: the layers.
        packed: what these get.
        before: what counted already before lowering.
        after: what counted already after it.
    """
    rows = []
    for plan in planned:
        place, choice, layer = plan.place, plan.choice, plan.layer
        nbytes = place.nbytes if layer is None else layer.nbytes
        dense = _identity(place.tensor), nbytes
        new = packed.get(place)
        kept = after.once(*dense) if new is None or choice.up_to is not None else 0
        part = 0 if new is None else after.once(id(next(new.buffers())), new.nbytes)
        rows.append(
            LoweredWeight(
                place.fqn,
                None if layer is None else _pattern(layer.zeros, layer.roles),
                None if layer is None else layer.density,
                choice.packing,
                choice.gain,
                choice.up_to,
                before.once(*dense),
                kept + part,
                choice.reason,
            )
        )
    return rows


def other_rows(
    planned: Sequence[Planned],
    model: nn.Module,
    weights: WeightMap,
    before: Bytes,
    after: Bytes,
) -> list[LoweredWeight]:
    """A row for every weight that is no such layer, with the reason.

    Args:
        planned: the layers.
        model: not lowered yet.
        weights: what discovery knows of it.
        before: what counted already before lowering.
        after: what counted already after it.
    """
    rows = []
    named = {name for plan in planned for name in plan.place.names}
    sites = weights.by_any_name()
    unclear = {p.fqn: p for p in weights.dense if not p.reason.explained}
    for stored in read_weights(model):
        if stored.data.ndim < 2 or not named.isdisjoint((stored.where, stored.fqn)):
            continue
        site = sites.get(stored.fqn)
        if stored.made_of:
            reason = "it is packed already"
        elif stored.quantized:
            reason = f"no kernel for {stored.dtype}, {stored.scheme}"
        elif site is not None:
            reason = no_kernel(site)
        elif stored.fqn in unclear:
            reason = unclear[stored.fqn].text
        else:
            continue
        rows.append(_dense_row(stored, reason, None if site is None else site.roles, before, after))
    return rows


def _dense_row(
    stored: StoredWeight,
    reason: str,
    roles: tuple[Role, ...] | None,
    before: Bytes,
    after: Bytes,
) -> LoweredWeight:
    """The row of a weight that no kernel is for."""
    pattern = density = None
    nbytes = 0
    if not stored.obstacle and stored.data.device.type != "meta":
        zeros = stored.zeros()
        density = 1 - int(zeros.count_nonzero()) / max(zeros.numel(), 1)
        roles = stored.roles or roles
        if roles is not None and len(roles) == zeros.ndim:
            pattern = _pattern(zeros, roles)
        nbytes = stored.data.numel() if stored.quantized else stored.data.nbytes
    identity = id(stored.data) if stored.quantized else _identity(stored.data)
    return LoweredWeight(
        stored.fqn,
        pattern,
        density,
        None,
        {},
        None,
        before.once(identity, nbytes),
        after.once(identity, nbytes),
        reason,
    )


def no_kernel(site: WeightSite) -> str:
    """Why a weight that is no layer of a known kind has none."""
    if len(site.shape) == 2 and site.kind in ("linear", "matmul", "embedding", "embedding_bag"):
        return "no module or node that lowering replaces holds it"
    return f"no kernel for weights of kind {site.kind} in {len(site.shape)} dimensions"


def _pattern(zeros: Tensor, roles: Sequence[Role]) -> str | None:
    config = tightest_pattern(zeros, roles)
    return None if config is None else config.short


def _identity(tensor: Any) -> int:
    """The same for all that lie in the same memory; a tensor of several counts as itself."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return tensor.data_ptr() if plain and tensor.numel() else id(tensor)
