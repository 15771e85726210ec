"""torchao's pt2e: `prepare_pt2e` and `convert_pt2e` on an exported graph."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torchao.quantization.pt2e import (
    FakeQuantize,
    allow_exported_model_train_eval,
    move_exported_model_to_eval,
)
from torchao.quantization.pt2e.observer import PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)
from torchao.quantization.pt2e.quantizer import (
    ComposableQuantizer,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from fx_sparsity.graph import AnnotateWeights, WeightMap
from fx_sparsity.graph.calls import bind, operator_name
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.frontends import export_model
from fx_sparsity.graph.operators import OPERATORS
from fx_sparsity.graph.uses import weight_arguments
from fx_sparsity.quantization.backend import (
    Backend,
    BackendError,
    Prepared,
    Quantized,
    check_float32,
    check_runs,
    check_unmasked,
    copied,
    refusing,
    used_by,
)
from fx_sparsity.quantization.observers import EMBEDDING_SPEC, FarRowsAlone, IntegerZeroPoint


class EmbeddingObserver(IntegerZeroPoint, PerChannelMinMaxObserver):
    """Observes embedding rows so that zero is a code."""


class FarRowsAloneObserver(FarRowsAlone, PerChannelMinMaxObserver):
    """Observes embedding rows so that zero is a code in those that span it."""


_AFFINE_ROWS: dict[str, Any] = {
    **EMBEDDING_SPEC,
    "dtype": torch.uint8,
    "quant_min": 0,
    "quant_max": 255,
}
_SYMMETRIC_ROWS: dict[str, Any] = {
    "dtype": torch.int8,
    "quant_min": -128,
    "quant_max": 127,
    "qscheme": torch.per_channel_symmetric,
    "ch_axis": 0,
}


class EmbeddingQuantizer(Quantizer):
    """8-bit embedding and embedding bag weights whose zero is a code.

    torchao's quantizer of the same name leaves embedding bags out, keeps fractional zero points,
    and gives rows whose scale is below 2**-12 a scale of 1.

    Args:
        observer: `FarRowsAloneObserver` quantizes rows whose values are all of one sign as torchao
            does, but for the scale of 1.
        qat: fake quantization to train with, instead of an observer.
        symmetric: int8 whose zero point is 0, with torch's own observer, instead of uint8.
    """

    def __init__(
        self,
        *,
        observer: type[PerChannelMinMaxObserver] = EmbeddingObserver,
        qat: bool = False,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if symmetric:
            observer = PerChannelMinMaxObserver
        partial = observer.with_args(eps=torch.finfo(torch.float32).eps)
        self.spec = QuantizationSpec(
            observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=partial) if qat else partial,
            **(_SYMMETRIC_ROWS if symmetric else _AFFINE_ROWS),
        )

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate the weight argument of every embedding operator."""
        for node in model.graph.nodes:
            row = OPERATORS.get(operator_name(node)) if node.op == "call_function" else None
            if row is not None and row.kind in ("embedding", "embedding_bag"):
                weight = bind(node)["weight"]
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                    input_qspec_map={weight: self.spec}, _annotated=True
                )
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check: every embedding operator takes this annotation."""


def default_quantizer(
    *,
    dynamic: bool = True,
    embedding_observer: type[PerChannelMinMaxObserver] = EmbeddingObserver,
    qat: bool = False,
    symmetric: bool = False,
) -> Quantizer:
    """int8 linears and convolutions for Inductor on x86, and 8-bit embeddings whose zero is a code.

    Args:
        dynamic: quantize activations as they come; otherwise with ranges from calibration.
        embedding_observer: see `EmbeddingQuantizer`.
        qat: fake quantization to train with, instead of observers.
        symmetric: activations and embeddings are int8, and all zero points are 0, as TensorRT takes
            them; not for Inductor, which wants activations in uint8.

    Raises:
        ValueError: symmetric, and not with ranges from calibration.
    """
    if symmetric and (dynamic or qat):
        raise ValueError("symmetric: expected dynamic=False and qat=False")
    config = get_default_x86_inductor_quantization_config(is_dynamic=dynamic, is_qat=qat)
    if symmetric:
        activation = replace(
            config.input_activation,
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_symmetric,
        )
        config = replace(config, input_activation=activation, output_activation=activation)
    embeddings = EmbeddingQuantizer(observer=embedding_observer, qat=qat, symmetric=symmetric)
    return ComposableQuantizer([embeddings, X86InductorQuantizer().set_global(config)])


class PT2EBackend(Backend):
    """`config` is a pt2e `Quantizer`; None is `default_quantizer()`, static where it trains.

    Between prepare and convert, `train()` and `eval()` switch dropout and batch norm, which is all
    that torchao can switch in a graph.
    """

    name = "pt2e"

    @torch.random.fork_rng()
    def prepare(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weights: WeightMap,
        *,
        config: Quantizer | None = None,
        dynamic_shapes: Any = None,
        qat: bool = False,
    ) -> Prepared:
        """See `Backend.prepare`. Gives a GraphModule.

        Raises:
            BackendError: live masks, something else than a quantizer, float64 weights, or training
                with weights that are not float32.
        """
        check_unmasked(model)
        if not (config is None or isinstance(config, Quantizer)):
            raise BackendError(
                "config: expected None or a Quantizer of torchao.quantization.pt2e, "
                f"found {config!r}"
            )
        if qat:
            check_float32(model, weights)
        # A copy, since the graph shares its weights, and masks may be baked into them.
        own = copied(model, training=None if qat else False)
        program = export_model(own, example_inputs, dynamic_shapes)
        graph_module = program.module()
        assert isinstance(graph_module, fx.GraphModule)
        # The x86 quantizer fails on operators whose result nobody reads, such as an unused pooler.
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        name_sources(graph_module)
        AnnotateWeights(weights)(graph_module)
        quantizer = config or default_quantizer(dynamic=not qat, qat=qat)
        prepare = prepare_qat_pt2e if qat else prepare_pt2e
        with refusing(prepare.__name__, model):
            prepared = prepare(graph_module, quantizer)
        allow_exported_model_train_eval(prepared)
        meant = frozenset(_annotated_weights(prepared))
        check_float32(own, meant, or_dtypes=(torch.bfloat16, torch.float16))
        in_float = {
            fqn: f"the quantizer annotates no weight of {used_by(site)}"
            for fqn, site in weights.items()
            if fqn not in meant
        }
        moved = dict(_one_name(prepared, weights))
        return Prepared(prepared, meant, moved, in_float=in_float)

    @torch.random.fork_rng()
    def convert(self, prepared: Prepared, example_inputs: ExampleInputs) -> Quantized:
        """See `Backend.convert`. Gives a GraphModule, ready for `torch.compile`."""
        assert isinstance(prepared.model, fx.GraphModule)
        with refusing("convert_pt2e", prepared.model):
            converted = convert_pt2e(prepared.model)
            converted.graph.eliminate_dead_code()
            converted = name_codes(drop_unread(converted))
            # After and not before, since new operators have lost what the quantizer noted. And only
            # where there is one to replace, since torchao captures what it looks for every time.
            if any(map(_is_trained, converted.graph.nodes)):
                move_exported_model_to_eval(converted)
        nn.Module.train(converted, False)
        check_runs(converted, example_inputs)
        return Quantized(converted, prepared.meant, prepared.in_float)


def _is_trained(node: fx.Node) -> bool:
    """Whether a node is a dropout or a batch norm in training mode."""
    if not any(name in operator_name(node) for name in ("dropout", "batch_norm")):
        return False
    arguments = bind(node)
    return arguments.get("train", arguments.get("training")) is not False


def _one_name(prepared: fx.GraphModule, weights: WeightMap) -> Iterator[tuple[str, str]]:
    """FQN of a tied weight -> the one of its names that export kept, for the others."""
    held = {name for name, _ in prepared.named_parameters(remove_duplicate=False)}
    for site in weights.sites:
        names = site.names
        kept = next((name for name in names if name in held), None)
        for name in names:
            if kept is not None and name not in held:
                yield name, kept


def _annotated_weights(prepared: fx.GraphModule) -> Iterator[str]:
    """FQNs of the weights that the quantizer put an observer on."""
    for node in prepared.graph.nodes:
        for weight, value in weight_arguments(node):
            if value.op == "call_module":
                yield weight.fqn


_SOURCES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.linear.default: functional.linear,
    torch.ops.aten.conv1d.default: functional.conv1d,
    torch.ops.aten.conv2d.default: functional.conv2d,
    torch.ops.aten.conv3d.default: functional.conv3d,
    torch.ops.aten.relu.default: functional.relu,
}


def name_sources(model: fx.GraphModule) -> None:
    """Note on operators which function of torch they came from, where capture did not.

    The x86 quantizer finds operators by that note alone. A non-strict export leaves it out; torch
    2.13 then falls back to the type of the owning module, which misses a functional linear, and
    earlier releases find nothing.
    """
    for node in model.graph.nodes:
        if node.target in _SOURCES:
            node.meta.setdefault("source_fn_stack", [(node.name, _SOURCES[node.target])])


def name_codes(model: fx.GraphModule) -> fx.GraphModule:
    """Name codes after the weight that they stand for, and scales and zero points beside it.

    Convert numbers them. What is exported, packaged or written for another runtime keeps names, and
    little else. A name that is taken stays: where a weight is stored twice, the first copy has it.
    Codes of a part of a weight, or of one that was transposed first, keep their number.
    """
    for node in model.graph.nodes:
        for weight, value in weight_arguments(node):
            if weight.is_whole and operator_name(value).startswith("dequantize"):
                for arg, held in bind(value).items():
                    if isinstance(held, fx.Node) and held.op == "get_attr":
                        _rename(model, str(held.target), weight.fqn + _SUFFIXES[arg])
    model.recompile()
    return model


_SUFFIXES = {
    "input": "",
    **dict.fromkeys(("scale", "scales"), "_scale"),
    **dict.fromkeys(("zero_point", "zero_points"), "_zero_point"),
}
"""Argument of a dequantization -> what the name of its tensor ends in."""


def _rename(model: fx.GraphModule, old: str, new: str) -> None:
    """Move a buffer of a graph, unless something has its new name."""
    path, _, attribute = new.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        model.add_submodule(path, owner := nn.Module())
    if hasattr(owner, attribute):
        return
    owner.register_buffer(attribute, model.get_buffer(old))
    held, _, last = old.rpartition(".")
    delattr(model.get_submodule(held), last)
    for node in model.graph.find_nodes(op="get_attr"):
        if node.target == old:
            node.target = new


def drop_unread(model: fx.GraphModule) -> fx.GraphModule:
    """Delete the parameters and buffers that no node reads: convert leaves the float weights."""
    read = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    held = [fqn for fqn, _ in model.named_parameters(remove_duplicate=False)]
    held += [fqn for fqn, _ in model.named_buffers(remove_duplicate=False)]
    for fqn in held:
        owner, _, attribute = fqn.rpartition(".")
        if fqn not in read:
            delattr(model.get_submodule(owner), attribute)
    return model
