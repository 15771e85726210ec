"""The `torch.compile` backend: `torch.compile(model, backend="fx_sparsity", options={...})`.

torch finds it through the entry point `torch_dynamo_backends` of this package.
"""

import ctypes
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from fx_sparsity.graph import MappingLike, SparsityMapping, WeightSite, find_weights
from fx_sparsity.graph.compiled import (
    compiled_callable,
    guard_identity,
    inductor,
    mode_options,
    named_backend,
    real_tensors,
)
from fx_sparsity.graph.context_blocks import OpenRegions
from fx_sparsity.graph.sources import Source, compiled_source
from fx_sparsity.graph.uses import canonical_fqn
from fx_sparsity.lowering.dense_tables import Lookup
from fx_sparsity.lowering.graph_places import NodePlace, places_by
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.lowering.places import GraphPlace
from fx_sparsity.lowering.plan import Bytes, Planned, choose, layer_rows, no_kernel
from fx_sparsity.lowering.policy import AUTO, LoweringError, Policy, Rules, checked_tokens
from fx_sparsity.lowering.report import LoweredWeight, LoweringReport
from fx_sparsity.lowering.rewrite import LowerNodes
from fx_sparsity.lowering.selection import Selection
from fx_sparsity.masks.bits import pack_bits, unpack_bits
from fx_sparsity.masks.engine import compute_mask
from fx_sparsity.masks.rank import Rank
from fx_sparsity.patterns import Role, SparsityConfig

_log = logging.getLogger(__name__)
_MASKED = "fx_sparsity_masked"


@dataclass(frozen=True)
class BackendOptions:
    """What `options=` of `torch.compile` may say.

    Attributes:
        mapping: which weights are pruned by magnitude, to which pattern: a `SparsityMapping`, or a
            dict that its `from_dict` reads. None for a model that is sparse already.
        policy: which layers get a kernel, as `lower` takes it.
        tokens: to measure with, as `lower` takes them.
        model: whose weights these are, where it is not the module that is compiled itself but a
            function that calls it.
        report: called with the `LoweringReport` of every graph that is compiled.
        inductor: options of Inductor, such as `{"freezing": True}`.
        then: what compiles the graph afterwards instead of Inductor: the name of a backend that
            torch knows, or a function (graph, example inputs) -> callable, as any backend is.
    """

    mapping: MappingLike | None = None
    policy: str | Rules = AUTO
    tokens: Sequence[int] | None = None
    model: nn.Module | None = None
    report: Callable[[LoweringReport], object] | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    then: str | Callable[..., Callable[..., Any]] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "BackendOptions":
        """Read the dict that `torch.compile` was given.

        Raises:
            LoweringError: an unknown key, or two that exclude one another.
        """
        known = [f.name for f in fields(cls)]
        if unknown := set(options or {}).difference(known):
            raise LoweringError(
                f"options: unknown key {min(unknown)!r}; expected {', '.join(known)}. Those of "
                "Inductor go into 'inductor'"
            )
        chosen = cls(**(options or {}))
        if chosen.then is not None and chosen.inductor:
            raise LoweringError(
                "options: 'inductor' is for Inductor, and 'then' takes its place; leave one out"
            )
        return chosen


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph for inference: prune by `mapping`, lower by `policy`, and let Inductor do it.

    The mapping is resolved once for all graphs of a module: a weight that is used in several is
    what its first use says. Masks are computed and weights are packed once a parameter, and kept as
    long as it lives: graph breaks and recompilations find the same ones. A parameter that was
    edited in place gets new ones when its graph is compiled again; until then what was compiled
    sees none of the edit.

    Args:
        graph: from Dynamo.
        example_inputs: of the graph, parameters among them.
        options: see `BackendOptions`.
        mode: of Inductor, such as `"reduce-overhead"`; torch takes either a mode or options, and
            beside other options it is `{"inductor": torch._inductor.list_mode_options(mode)}`.

    Raises:
        LoweringError: gradients are wanted, an option that cannot be read, or a mode beside
            `then`.
        MappingError: a weight cannot take its pattern.
    """
    chosen = BackendOptions.of(options)
    if mode is not None and chosen.then is not None:
        raise LoweringError("a mode is for Inductor, and 'then' takes its place; leave one out")
    _check_inference(example_inputs)
    with real_tensors(), torch.no_grad():
        lowered = _lowered(graph, example_inputs, chosen)
    compiled: Callable[..., Any]
    if chosen.then is not None:
        compiled = named_backend(chosen.then)(lowered, list(example_inputs))
    else:
        patches = {**mode_options(mode), **chosen.inductor}
        compiled = inductor()(lowered, list(example_inputs), config_patches=patches)
    return compiled


def _check_inference(example_inputs: Sequence[Any]) -> None:
    """Raise if a backward pass would be compiled, for masks and kernels know none of weights.

    Raises:
        LoweringError: what to do.
    """
    wanted = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    )
    if wanted:
        raise LoweringError(
            "backend 'fx_sparsity' is for inference, and gradients are enabled: call the compiled "
            "model under torch.inference_mode() or torch.no_grad(). To train with masks, use "
            "fx_sparsity.prepare and any other backend"
        )


class _Asked(NamedTuple):
    """What a mapping asks of one weight, with the roles of its axes."""

    config: SparsityConfig
    roles: tuple[Role, ...]


class _Known:
    """What was computed for one parameter, with the values that it has.

    Attributes:
        values: a checksum of these. Autograd counts edits, too, but neither those through `.data`
            nor any of a tensor that was made under `torch.inference_mode()`.
    """

    def __init__(self, values: int) -> None:
        self.values = values
        self._masks: dict[_Asked, Tensor] = {}
        self._dense: dict[_Asked, Tensor] = {}
        self._packed: dict[tuple[_Asked | None, str, str], LoweredLinear] = {}

    def masked(self, asked: "_Asked", weight: Tensor) -> Tensor:
        """The weight with what its mask prunes set to zero."""
        if (dense := self._dense.get(asked)) is not None:
            return dense
        if (packed := self._masks.get(asked)) is None:
            tiling = asked.config.pattern.tiling(weight.shape, asked.roles)
            keep = compute_mask(weight.detach(), tiling, asked.config.level, Rank.MAGNITUDE)
            packed = self._masks[asked] = pack_bits(keep)
        keep = unpack_bits(packed, weight.shape).to(weight.device)
        return torch.where(keep, weight.detach(), weight.new_zeros(()))

    def keep(self, asked: "_Asked", masked: Tensor) -> Tensor:
        """Hold on to a masked weight that stays dense, for all graphs."""
        return self._dense.setdefault(asked, masked)

    def packed(self, plan: Planned, asked: "_Asked | None") -> LoweredLinear:
        """The layer that a plan asks for; layers of one weight share its packed parts."""
        assert isinstance(plan.layer, DenseLinear)
        assert plan.choice.packing is not None
        assert isinstance(plan.place, NodePlace)
        place = plan.place
        key = asked, f"{place.seen.steps} {place.transposed}", plan.choice.packing
        layer = plan.choice.packed
        if not isinstance(layer, LoweredLinear) or key in self._packed:
            layer = plan.layer.pack(plan.choice.packing, self._packed.get(key))
        self._packed.setdefault(key, layer)
        return layer


_KNOWN = WeakTensorKeyDictionary()
"""Parameter -> what was computed for it, for as long as it lives."""


def _known(parameter: Tensor) -> _Known:
    known, values = _KNOWN.get(parameter), _checksum(parameter)
    if known is None or known.values != values:
        known = _KNOWN[parameter] = _Known(values)
    return known


def _checksum(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of the values of a tensor, or of the tensors that it is made of."""
    if is_traceable_wrapper_subclass(tensor):  # such as torchao's
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            start = _checksum(getattr(tensor, name), start)
        return start
    data = tensor.detach().cpu().contiguous()
    return zlib.crc32((ctypes.c_char * data.nbytes).from_address(data.data_ptr()), start)


def _lowered(
    graph: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions
) -> fx.GraphModule:
    """The graph, with masks and kernels."""
    OpenRegions()(graph)
    owner = compiled_callable() if options.model is None else options.model
    model = owner if isinstance(owner, nn.Module) else None
    mapping = None if options.mapping is None else SparsityMapping.of(options.mapping)
    source = _plainly_named(compiled_source(graph, example_inputs, model))
    parameters = dict(filter(None, map(source, graph.graph.nodes)))
    weights = find_weights(graph, tuple(example_inputs), model=model)
    selection = Selection.of(owner)
    selected = selection.take_in(weights, parameters)
    configs = {} if mapping is None else mapping.resolve(selected, partial=True)
    asked = {fqn: _Asked(config, selected[fqn].roles) for fqn, config in configs.items()}
    known = cache(lambda fqn: _known(parameters[fqn]))
    masked = {fqn: known(fqn).masked(wanted, parameters[fqn]) for fqn, wanted in asked.items()}

    def sparse(node: fx.Node) -> tuple[str, Tensor] | None:
        found = source(node)
        if found is None or found[1].dtype == torch.bool:  # a mask selects, and is no weight
            return None
        return found[0], masked.get(*found)

    linear = [place for place in places_by(graph, sparse) if isinstance(place, NodePlace)]
    planned = choose(linear, Policy(options.policy), checked_tokens(options.tokens))
    packed: dict[GraphPlace, LoweredLinear | Lookup] = {}
    for plan in planned:
        if plan.choice.packing is not None:
            fqn = plan.place.fqn
            assert isinstance(plan.place, NodePlace)
            packed[plan.place] = known(fqn).packed(plan, asked.get(fqn))
    rows = layer_rows(planned, packed, Bytes(), Bytes())
    named = {plan.place.fqn for plan in planned}
    rows += [
        _dense_row(site, parameters[site.fqn]) for site in weights.sites if site.fqn not in named
    ]
    report = LoweringReport(tuple(rows), tuple(selection.notes(mapping, model)))
    _log.info("%s", report)
    for note in report.notes:
        _log.warning("%s", note)
    if options.report is not None:
        options.report(report)
    guard_identity(parameters[fqn] for fqn in {place.fqn for place in packed} | masked.keys())
    # What Dynamo noted on the graph speaks of its inputs alone, and forbids buffers of its own.
    graph = fx.GraphModule(graph, graph.graph)
    graph.meta = {}
    LowerNodes(packed)(graph)
    _read_masked(
        graph, source, {fqn: partial(known(fqn).keep, asked[fqn], masked[fqn]) for fqn in masked}
    )
    return graph


def _plainly_named(source: Source) -> Source:
    """The same source, where what lies beneath a parametrization has the name of its weight."""

    def named(node: fx.Node) -> tuple[str, Tensor] | None:
        found = source(node)
        return None if found is None else (canonical_fqn(found[0]), found[1])

    return named


def _read_masked(
    graph: fx.GraphModule, source: Source, keep: Mapping[str, Callable[[], Tensor]]
) -> None:
    """Read masked weights, as constants, in the place of those that still have readers."""
    holder = nn.Module()
    graph.add_module(_MASKED, holder)
    placeholders = graph.graph.find_nodes(op="placeholder")
    for position, node in enumerate(placeholders):
        found = source(node)
        if found is None or found[0] not in keep or not node.users:
            continue
        name = f"input_{position}"
        holder.register_buffer(name, keep[found[0]]())
        with graph.graph.inserting_after(placeholders[-1]):
            new = graph.graph.get_attr(f"{_MASKED}.{name}")
        new.meta = {k: v for k, v in node.meta.items() if k in ("val", "example_value")}
        node.replace_all_uses_with(new)
    graph.recompile()


def _dense_row(site: WeightSite, weight: Tensor) -> LoweredWeight:
    """The row of a weight that no kernel is for."""
    return LoweredWeight(
        site.fqn,
        None,
        None,
        None,
        {},
        None,
        weight.nbytes,
        weight.nbytes,
        no_kernel(site),
    )
