"""`torch.ao.quantization` in FX graph mode: `prepare_fx` and `convert_fx` on a symbolic trace.

Deprecated in torch, and still what many have. Its prepare fuses modules, which moves weights, and
shares the modules of its input; both are dealt with here.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.quantization import quantize_fx

from fx_sparsity.graph import AnnotateWeights, WeightMap
from fx_sparsity.graph.example_inputs import ExampleInputs, call_arguments
from fx_sparsity.graph.uses import noted_weights, weight_arguments
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
from fx_sparsity.quantization.torch_ao.embeddings import (
    check_quantizable,
    convert_tables,
    embedding_qconfig,
    is_float_embedding,
)
from fx_sparsity.quantization.torch_ao.modules import (
    check_engine,
    check_fused,
    is_dynamic,
    quantizes,
    quiet,
    read_affine,
    unreadable,
)
from fx_sparsity.verification.stored import StoredWeight


def default_qconfig_mapping(*, dynamic: bool = False, qat: bool = False) -> tq.QConfigMapping:
    """int8 linears (and, where static, convolutions), and 8-bit embeddings whose zero is a code.

    Args:
        dynamic: quantize the activations of linears as they come; otherwise with ranges from
            calibration.
        qat: fake quantization to train with, instead of observers; always static.
    """
    if dynamic and not qat:
        # For all, since what is fused must agree; only linears have dynamic operators here.
        mapping = tq.QConfigMapping().set_global(tq.per_channel_dynamic_qconfig)
    elif qat:
        mapping = tq.get_default_qat_qconfig_mapping("x86")
    else:
        mapping = tq.get_default_qconfig_mapping("x86")
    for kind in (nn.Embedding, nn.EmbeddingBag):
        mapping.set_object_type(kind, embedding_qconfig)
    return mapping


class FXBackend(Backend):
    """`config` is a `QConfigMapping`; None is `default_qconfig_mapping()`.

    Embeddings are quantized by their weights alone, when converting, also after QAT.
    """

    name = "fx"

    @torch.random.fork_rng()
    def prepare(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weights: WeightMap,
        *,
        config: tq.QConfigMapping | None = None,
        dynamic_shapes: Any = None,
        qat: bool = False,
    ) -> Prepared:
        """See `Backend.prepare`. Gives a GraphModule.

        Raises:
            BackendError: live masks, something else than a mapping, weights that are not float32,
                no quantized engine, or a model that cannot be traced.
        """
        del dynamic_shapes
        check_unmasked(model)
        check_engine()
        if not (config is None or isinstance(config, tq.QConfigMapping)):
            raise BackendError(
                f"config: expected None or a torch.ao.quantization.QConfigMapping, found {config!r}"
            )
        mapping = default_qconfig_mapping(qat=qat) if config is None else copy.deepcopy(config)
        own = copied(model, training=qat)
        tables = {}
        for name, module in own.named_modules():
            if qat:
                check_fused(name, module)
            if is_float_embedding(module):
                qconfig = _qconfig_of(name, module, mapping)
                if qconfig is not None:
                    check_quantizable(name, module, qconfig)
                    tables[name] = qconfig
                mapping.set_module_name(name, None)
        prepare = quantize_fx.prepare_qat_fx if qat else quantize_fx.prepare_fx
        args, kwargs = call_arguments(example_inputs)
        # Whatever the model's own code raises on proxies, too.
        with refusing("prepare_qat_fx" if qat else "prepare_fx", model), quiet():
            prepared = prepare(own, mapping, (*args, *kwargs.values()))
        moved = dict(_moved(prepared, weights))
        AnnotateWeights(weights.renamed(moved))(prepared)
        observed = {
            weight.fqn
            for node in prepared.graph.nodes
            for weight, value in weight_arguments(node)
            if value.op == "call_module"
        }
        meant = frozenset(
            fqn
            for fqn, site in weights.items()
            if fqn in observed
            or _is_meant(prepared, moved.get(fqn, fqn), qat)
            or any(name.rpartition(".")[0] in tables for name in (fqn, *site.aliases))
        )
        check_float32(model, meant)
        in_float = {
            fqn: "the mapping has no qconfig, or torch no quantized operator, for "
            f"{used_by(site)} in the class {site.owner_type.rpartition('.')[2]}"
            for fqn, site in weights.items()
            if fqn not in meant
        }
        return Prepared(prepared, meant, moved, config=tables, in_float=in_float)

    @torch.random.fork_rng()
    def convert(self, prepared: Prepared, example_inputs: ExampleInputs) -> Quantized:
        """See `Backend.convert`. Gives a GraphModule of torch's quantized modules."""
        model = convert_tables(prepared.model.eval(), prepared.config)
        assert isinstance(model, fx.GraphModule)
        with refusing("convert_fx", model), quiet():
            converted = quantize_fx.convert_fx(model)
        converted.eval()
        check_runs(converted, example_inputs)
        return Quantized(converted, prepared.meant, prepared.in_float)

    def read(self, model: nn.Module) -> Iterator[StoredWeight]:
        """See `Backend.read`: functional operators with packed weights.

        Where nobody annotated the graph, they have the names of what holds them.

        Quantized modules are those of eager mode, and read there.
        """
        if not isinstance(model, fx.GraphModule):
            return
        for node in model.graph.nodes:
            if not str(node.target).startswith("quantized."):
                continue
            packed = next(
                (
                    a
                    for a in node.all_input_nodes
                    if a.op == "get_attr" and "packed" in str(a.target)
                ),
                None,
            )
            if packed is not None:
                noted = noted_weights(node).get("weight")
                fqn = str(packed.target) if noted is None else noted.fqn
                yield _read_packed(model, fqn, str(packed.target), str(node.target))


def _qconfig_of(name: str, module: nn.Module, mapping: tq.QConfigMapping) -> tq.QConfig | None:
    """What a mapping says of an embedding; the qconfig for all modules does not fit it."""
    if name in mapping.module_name_qconfigs:
        return mapping.module_name_qconfigs[name]
    for regex, qconfig in mapping.module_name_regex_qconfigs.items():
        if re.match(regex, name):
            return qconfig
    return next(
        (
            mapping.object_type_qconfigs[kind]
            for kind in type(module).__mro__
            if kind in mapping.object_type_qconfigs
        ),
        None,
    )


def _moved(prepared: nn.Module, weights: WeightMap) -> Iterator[tuple[str, str]]:
    """FQN in the float model -> FQN in the prepared one, where the owner was fused."""
    for site in weights.sites:
        for fqn in site.names:
            owner, _, attribute = fqn.rpartition(".")
            parent, _, last = owner.rpartition(".")
            module = _submodule(prepared, owner)
            above = _submodule(prepared, parent)
            if module is None and last == "0" and _trains(above) and hasattr(above, attribute):
                # It was fused beforehand, and what is trained holds the weight itself.
                yield fqn, f"{parent}.{attribute}".removeprefix(".")
            fused = isinstance(module, nn.Sequential) and "0" in module._modules
            if fused and hasattr(_submodule(module, "0"), attribute):
                yield fqn, f"{owner}.0.{attribute}"


def _submodule(model: nn.Module | None, name: str) -> nn.Module | None:
    """None where there is none, as at the path of a functional operator."""
    try:
        return None if model is None else model.get_submodule(name)
    except AttributeError:
        return None


def _trains(module: nn.Module | None) -> bool:
    """Whether prepare put a module in the place of a float one, to train it."""
    return type(module) in tq.get_default_qat_module_mappings().values()


def _is_meant(prepared: fx.GraphModule, fqn: str, qat: bool) -> bool:
    """Whether prepare gave the owner of a weight a qconfig, and convert will find and swap it.

    Modules within others that tracing takes as one, such as the output of multi-head attention,
    are given a qconfig as well; convert looks at those that the graph calls.
    """
    owner = fqn.rpartition(".")[0]
    parent, _, last = owner.rpartition(".")
    called = {str(node.target) for node in prepared.graph.find_nodes(op="call_module")}
    if not (owner in called or (last == "0" and parent in called)):
        return False
    module = _submodule(prepared, owner)
    swapped = module if owner in called else _submodule(prepared, parent)
    qconfig = getattr(module, "qconfig", None)
    if qconfig is None or not quantizes(qconfig):
        return False
    if qat:
        return _trains(swapped)
    if is_dynamic(qconfig):
        return type(swapped) in tq.get_default_dynamic_quant_module_mappings()
    return type(swapped) in tq.get_default_static_quant_module_mappings()


def _read_packed(model: fx.GraphModule, fqn: str, where: str, operator: str) -> StoredWeight:
    """The weight of a functional operator: a packed attribute that can only be rebuilt."""
    found = re.match(r"quantized\.(linear|conv\dd)", operator)
    if found is None:
        return unreadable(fqn, where, operator, ())
    kind = found[1]
    ops = torch.ops.quantized
    half = "_fp16" if "fp16" in operator else ""
    held: Any = getattr(model, where)
    weight, bias = getattr(ops, f"{kind}_unpack{half}")(held)

    def rebuild(new: Tensor) -> None:
        if kind == "linear":
            made = getattr(ops, f"linear_prepack{half}")(new, bias)
        else:
            geometry = (held.stride(), held.padding(), held.dilation(), held.groups())
            made = getattr(ops, f"{kind}_prepack")(new, bias, *geometry)
        setattr(model, where, made)

    return read_affine(fqn, where, weight, rebuild)
