"""The `torch.compile` backend: `torch.compile(model, backend="fx_sparsity", options={...})`.

torch finds it through the entry point `torch_dynamo_backends` of this package.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fx_sparsity.graph import MappingLike, SparsityMapping, WeightSite, find_weights
from fx_sparsity.graph.compiled import inductor, real_tensors
from fx_sparsity.graph.sources import Source, compiled_source
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.lowering.plan import Bytes, Planned, choose, layer_rows, no_kernel
from fx_sparsity.lowering.policy import AUTO, LoweringError, Policy, Rules, checked_tokens
from fx_sparsity.lowering.report import LoweredWeight, LoweringReport
from fx_sparsity.lowering.rewrite import LowerNodes, NodePlace, places_by
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
        model: the module that is compiled; tells names of weights where graph breaks inside its
            submodules hide them from Dynamo.
        report: called with the `LoweringReport` of every graph that is compiled.
        inductor: options of Inductor, such as `{"freezing": True}`.
    """

    mapping: MappingLike | None = None
    policy: str | Rules = AUTO
    tokens: Sequence[int] | None = None
    model: nn.Module | None = None
    report: Callable[[LoweringReport], object] | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "BackendOptions":
        """Read the dict that `torch.compile` was given.

        Raises:
            LoweringError: an unknown key.
        """
        known = [f.name for f in fields(cls)]
        if unknown := set(options or {}).difference(known):
            raise LoweringError(
                f"options: unknown key {min(unknown)!r}; expected {', '.join(known)}. Those of "
                "Inductor go into 'inductor'"
            )
        return cls(**(options or {}))


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph for inference: prune by `mapping`, lower by `policy`, and let Inductor do it.

    Masks are computed and weights are packed once a parameter, and kept as long as it lives: graph
    breaks and recompilations find the same ones. A parameter that was edited in place gets new ones
    when its graph is compiled again; until then what was compiled sees none of the edit.

    Args:
        graph: from Dynamo.
        example_inputs: of the graph, parameters among them.
        options: see `BackendOptions`.

    Raises:
        LoweringError: gradients are wanted, or an option that cannot be read.
        MappingError: a weight cannot take its pattern.
    """
    chosen = BackendOptions.of(options)
    _check_inference(example_inputs)
    with real_tensors(), torch.no_grad():
        lowered = _lowered(graph, example_inputs, chosen)
    compiled: Callable[..., Any] = inductor()(
        lowered, list(example_inputs), config_patches=dict(chosen.inductor)
    )
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


class _Known:
    """What was computed for one parameter, as it is since its last edit.

    Attributes:
        version: of the parameter, which counts its edits.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self._masks: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        self._packed: dict[tuple[str, str], LoweredLinear] = {}

    def masked(self, config: SparsityConfig, roles: Sequence[Role], weight: Tensor) -> Tensor:
        """The weight with what its mask prunes set to zero."""
        if (dense := self._dense.get(str(config))) is not None:
            return dense
        if (packed := self._masks.get(str(config))) is None:
            tiling = config.pattern.tiling(weight.shape, roles)
            keep = compute_mask(weight.detach(), tiling, config.level, Rank.MAGNITUDE)
            packed = self._masks[str(config)] = pack_bits(keep)
        keep = unpack_bits(packed, weight.shape).to(weight.device)
        return torch.where(keep, weight.detach(), weight.new_zeros(()))

    def keep(self, config: SparsityConfig, masked: Tensor) -> Tensor:
        """Hold on to a masked weight that stays dense, for all graphs."""
        return self._dense.setdefault(str(config), masked)

    def packed(self, plan: Planned, config: SparsityConfig | None) -> LoweredLinear:
        """The layer that a plan asks for; layers of one weight share its packed parts."""
        assert isinstance(plan.layer, DenseLinear)
        assert plan.choice.packing is not None
        assert isinstance(plan.place, NodePlace)
        place = plan.place
        key = f"{config} {place.seen.steps} {place.transposed}", plan.choice.packing
        layer = plan.choice.packed
        if not isinstance(layer, LoweredLinear) or key in self._packed:
            layer = plan.layer.pack(plan.choice.packing, self._packed.get(key))
        self._packed.setdefault(key, layer)
        return layer


_KNOWN = WeakTensorKeyDictionary()
"""Parameter -> what was computed for it, for as long as it lives."""


def _known(parameter: Tensor) -> _Known:
    known = _KNOWN.get(parameter)
    if known is None or known.version != parameter._version:
        known = _KNOWN[parameter] = _Known(parameter._version)
    return known


def _lowered(
    graph: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions
) -> fx.GraphModule:
    """The graph, with masks and kernels."""
    source = compiled_source(graph, example_inputs, options.model)
    weights = find_weights(graph, tuple(example_inputs), model=options.model)
    configs: Mapping[str, SparsityConfig] = {}
    if options.mapping is not None:
        configs = SparsityMapping.of(options.mapping).resolve(weights, partial=True)
    parameters = dict(filter(None, map(source, graph.graph.nodes)))
    masked = {
        fqn: _known(parameters[fqn]).masked(config, weights[fqn].roles, parameters[fqn])
        for fqn, config in configs.items()
    }

    def sparse(node: fx.Node) -> tuple[str, Tensor] | None:
        found = source(node)
        return None if found is None else (found[0], masked.get(*found))

    planned = choose(
        list(places_by(graph, sparse)), Policy(options.policy), checked_tokens(options.tokens)
    )
    packed: dict[NodePlace, LoweredLinear] = {}
    for plan in planned:
        if plan.choice.packing is not None:
            fqn = plan.place.fqn
            assert isinstance(plan.place, NodePlace)
            packed[plan.place] = _known(parameters[fqn]).packed(plan, configs.get(fqn))
    rows = layer_rows(planned, packed, Bytes(), Bytes())
    named = {plan.place.fqn for plan in planned}
    rows += [
        _dense_row(site, parameters[site.fqn]) for site in weights.sites if site.fqn not in named
    ]
    report = LoweringReport(tuple(rows))
    _log.info("%s", report)
    if options.report is not None:
        options.report(report)
    # What Dynamo noted on the graph speaks of its inputs alone, and forbids buffers of its own.
    graph = fx.GraphModule(graph, graph.graph)
    graph.meta = {}
    LowerNodes(packed)(graph)
    _read_masked(graph, source, masked, configs)
    return graph


def _read_masked(
    graph: fx.GraphModule,
    source: Source,
    masked: Mapping[str, Tensor],
    configs: Mapping[str, SparsityConfig],
) -> None:
    """Read masked weights, as constants, in the place of those that still have readers."""
    holder = nn.Module()
    graph.add_module(_MASKED, holder)
    for node in graph.graph.find_nodes(op="placeholder"):
        found = source(node)
        if found is None or found[0] not in masked or not node.users:
            continue
        fqn, parameter = found
        name = fqn.replace(".", "_")
        holder.register_buffer(name, _known(parameter).keep(configs[fqn], masked[fqn]))
        with graph.graph.inserting_after(graph.graph.find_nodes(op="placeholder")[-1]):
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
