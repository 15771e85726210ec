"""`torch.ao.quantization` in eager mode: modules are swapped, without a graph.

Deprecated in torch, and still what many have. Its embeddings are the only modules whose weights
lose their zeros; see `embeddings.py` for the cure.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.ao import quantization as tq

from fx_sparsity.graph import WeightMap
from fx_sparsity.graph.capture import ExampleInputs
from fx_sparsity.quantization.backend import (
    Backend,
    Prepared,
    Quantized,
    check_float32,
    check_runs,
    check_unmasked,
)
from fx_sparsity.quantization.embeddings import (
    check_quantizable,
    convert_tables,
    embedding_qconfig,
    is_float_embedding,
)
from fx_sparsity.quantization.modules import (
    check_engine,
    is_dynamic,
    quiet,
    read_modules,
)
from fx_sparsity.quantization.stored import StoredWeight

QConfigs = Mapping[type[nn.Module], tq.QConfig | None]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def default_qconfigs(*, dynamic: bool = True, qat: bool = False) -> QConfigs:
    """int8 linears (and, where static, convolutions), and 8-bit embeddings whose zero is a code.

    Args:
        dynamic: quantize the activations of linears as they come; otherwise with ranges from
            calibration.
        qat: fake quantization to train with, instead of observers; always static.
    """
    tables = {nn.Embedding: embedding_qconfig, nn.EmbeddingBag: embedding_qconfig}
    if dynamic and not qat:
        return {nn.Linear: tq.per_channel_dynamic_qconfig, **tables}
    static = tq.get_default_qat_qconfig("x86") if qat else tq.get_default_qconfig("x86")
    return {**dict.fromkeys((nn.Linear, *_CONVOLUTIONS), static), **tables}


@dataclass
class _Plan:
    """What convert needs to know.

    Attributes:
        tables: name of an embedding -> its qconfig.
        dynamic: name of a module -> its qconfig, which has nothing to calibrate.
        classes: float or prepared class -> quantized class.
        shared: names of one module, where it has several.
    """

    tables: dict[str, tq.QConfig] = field(default_factory=dict)
    dynamic: dict[str, tq.QConfig] = field(default_factory=dict)
    classes: dict[Any, Any] = field(default_factory=dict)
    shared: list[list[str]] = field(default_factory=list)


class EagerBackend(Backend):
    """`prepare`, `prepare_qat` and `convert`.

    `config` maps module classes to qconfigs; None is `default_qconfigs()`. A class stands for
    itself, as in torch; that of an embedding also for its subclasses, where the nearest one counts.
    The qconfig None leaves modules of its class in float.

    A module with a static qconfig gets a quantizer before it and a dequantizer behind it
    (`QuantWrapper`), unless the model has `QuantStub`s of its own. Embeddings are quantized by
    their weights alone, when converting, also after QAT.
    """

    name = "eager"

    def prepare(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weights: WeightMap,
        *,
        config: QConfigs | None = None,
        dynamic_shapes: Any = None,
        qat: bool = False,
    ) -> Prepared:
        """See `Backend.prepare`.

        Raises:
            BackendError: live masks, weights that are not float32, an embedding whose weight a hook
                computes, or no quantized engine.
        """
        del example_inputs, dynamic_shapes
        check_unmasked(model)
        check_engine()
        copied = copy.deepcopy(model)
        qconfigs = default_qconfigs(qat=qat) if config is None else config
        chosen: dict[nn.Module, tuple[tq.QConfig, list[str]]] = {}
        for name, module in copied.named_modules(remove_duplicate=False):
            qconfig = _qconfig_of(module, qconfigs)
            if qconfig is not None:
                chosen.setdefault(module, (qconfig, []))[1].append(name)
        held = {f"{n}.weight".removeprefix(".") for _, names in chosen.values() for n in names}
        meant = frozenset(fqn for fqn, site in weights.items() if held & {fqn, *site.aliases})
        check_float32(model, held)

        plan = _Plan(classes=dict(tq.get_default_static_quant_module_mappings()))
        own_stubs = any(isinstance(module, tq.QuantStub) for module in copied.modules())
        moved = {}
        for module, (qconfig, names) in chosen.items():
            if is_float_embedding(module):
                check_quantizable(names[0], module)
                plan.tables[names[0]] = qconfig
            elif is_dynamic(qconfig):
                plan.dynamic[names[0]] = qconfig
                dynamic = tq.get_default_dynamic_quant_module_mappings()
                plan.classes[type(module)] = dynamic[type(module)]
            else:
                module.qconfig = qconfig  # type: ignore[assignment]
                if not own_stubs:
                    copied = _replace(copied, names, tq.QuantWrapper(module))
                    for name in names:
                        fqn, there = (f"{n}.weight" for n in (name, f"{name}.module"))
                        moved[fqn.removeprefix(".")] = there.removeprefix(".")
            if len(names) > 1:
                plan.shared.append(names)
        if qat:
            copied.train()
        if len(chosen) > len(plan.tables) + len(plan.dynamic):
            with quiet():
                copied = (tq.prepare_qat if qat else tq.prepare)(copied, inplace=True)
        _unify(copied, plan.shared)
        return Prepared(copied, meant, moved, plan)

    def convert(self, prepared: Prepared, example_inputs: ExampleInputs) -> Quantized:
        """See `Backend.convert`."""
        plan: _Plan = prepared.config
        model = convert_tables(prepared.model.eval(), plan.tables)
        for name, qconfig in plan.dynamic.items():
            model.get_submodule(name).qconfig = qconfig  # type: ignore[assignment]
        with quiet():
            model = tq.convert(model, mapping=plan.classes, inplace=True)
        _unify(model, plan.shared)
        check_runs(model, example_inputs)
        return Quantized(model, prepared.meant)

    def read(self, model: nn.Module) -> Iterator[StoredWeight]:
        """See `Backend.read`."""
        yield from read_modules(model)


def _qconfig_of(module: nn.Module, qconfigs: QConfigs) -> tq.QConfig | None:
    """The qconfig for a module; None where it stays in float."""
    classes = type(module).__mro__ if is_float_embedding(module) else (type(module),)
    return next((qconfigs[kind] for kind in classes if kind in qconfigs), None)


def _replace(model: nn.Module, names: list[str], new: nn.Module) -> nn.Module:
    """Put a module in the places of another; returns the model, which may itself be replaced."""
    if "" in names:
        return new
    for name in names:
        model.set_submodule(name, new)
    return model


def _unify(model: nn.Module, shared: list[list[str]]) -> None:
    """Give shared modules one instance again: torch swaps them once for some of their names."""
    for names in shared:
        module = model.get_submodule(names[0])
        for alias in names[1:]:
            model.set_submodule(alias, module)
