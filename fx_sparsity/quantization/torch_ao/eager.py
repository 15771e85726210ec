"""`torch.ao.quantization` in eager mode: modules are swapped, without a graph.

Deprecated in torch, and still what many have. Its embeddings are the only modules whose weights
lose their zeros; see `embeddings.py` for the cure.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.ao.nn.quantized as nnq
from torch import nn
from torch.ao import quantization as tq

from fx_sparsity.graph import WeightMap
from fx_sparsity.graph.example_inputs import ExampleInputs
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
    fused_owner,
    is_dynamic,
    quantizes,
    quiet,
    read_modules,
)
from fx_sparsity.verification.stored import StoredWeight

QConfigs = Mapping[type[nn.Module], tq.QConfig | None]

_MARKERS = (tq.QuantStub, tq.DeQuantStub, nnq.FloatFunctional)
"""What users put into a model for quantization's sake."""
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


class _Chosen(NamedTuple):
    """A module that is quantized.

    Attributes:
        module: of the copied model.
        names: all of its names.
        qconfig: how it is quantized.
    """

    module: nn.Module
    names: list[str]
    qconfig: tq.QConfig

    @property
    def fqns(self) -> list[str]:
        """Names of its weight."""
        return [_weight_of(name, self.module) for name in self.names]


class EagerBackend(Backend):
    """`prepare`, `prepare_qat` and `convert`.

    `config` maps module classes to qconfigs; None is `default_qconfigs()`. A class stands for
    itself, as in torch; that of an embedding also for its subclasses, where the nearest one counts.
    The qconfig None leaves modules of its class in float.

    A module that `fuse_modules` made has the qconfig of the linear or convolution in it, unless its
    own class is a key.

    A module with a static qconfig gets a quantizer before it and a dequantizer behind it
    (`QuantWrapper`), unless the model has `QuantStub`s of its own. These, `DeQuantStub`s and
    `FloatFunctional`s then have the qconfig of the first static module, unless `config` names their
    classes. Embeddings are quantized by their weights alone, when converting, also after QAT.

    Classes that the model has no module of are no error.
    """

    name = "eager"

    @torch.random.fork_rng()
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
            BackendError: live masks, something else than a mapping of classes, weights that are not
                float32, a class that torch has no quantized one for, an embedding whose weight a
                hook computes, or no quantized engine.
        """
        del example_inputs, dynamic_shapes
        check_unmasked(model)
        check_engine()
        qconfigs = default_qconfigs(qat=qat) if config is None else config
        _check_qconfigs(qconfigs)
        own = copied(model)
        chosen = _choose(own, qconfigs)
        check_float32(own, {fqn for entry in chosen for fqn in entry.fqns})
        codes = {fqn for entry in chosen if quantizes(entry.qconfig) for fqn in entry.fqns}
        meant = frozenset(fqn for fqn, site in weights.items() if codes & {fqn, *site.aliases})

        plan = _plan(chosen)
        own, static = _configure_static(own, [e for e in chosen if _is_static(e)], qconfigs)
        if qat:
            own.train()
        if static:
            with refusing("prepare_qat" if qat else "prepare", model), quiet():
                own = (tq.prepare_qat if qat else tq.prepare)(own, inplace=True)
        _unify(own, plan.shared)
        # Only now, since what is trained in the place of a fused module holds the weight itself.
        moved = {
            fqn: there
            for fqn, name in static.items()
            for there in [_weight_of(name.removeprefix("."), own.get_submodule(name.strip(".")))]
            if there != fqn
        }
        in_float = {
            fqn: f"`config` has no qconfig for the class {site.owner_type.rpartition('.')[2]}"
            for fqn, site in weights.items()
            if fqn not in meant
        }
        return Prepared(own, meant, moved, plan, in_float)

    @torch.random.fork_rng()
    def convert(self, prepared: Prepared, example_inputs: ExampleInputs) -> Quantized:
        """See `Backend.convert`."""
        plan: _Plan = prepared.config
        model = convert_tables(prepared.model.eval(), plan.tables)
        for name, qconfig in plan.dynamic.items():
            module = model.get_submodule(name)
            for owner in (module, fused_owner(module)):
                if owner is not None:
                    owner.qconfig = qconfig  # type: ignore[assignment]
        # `convert` swaps modules in their parents, and so no root: it gets a parent.
        parent = nn.Sequential(model)
        with refusing("convert", model), quiet():
            model = tq.convert(parent, mapping=plan.classes, inplace=True)[0]
        _unify(model, plan.shared)
        check_runs(model, example_inputs)
        return Quantized(model.eval(), prepared.meant, prepared.in_float)

    def read(self, model: nn.Module) -> Iterator[StoredWeight]:
        """See `Backend.read`."""
        yield from read_modules(model)


def _choose(model: nn.Module, qconfigs: QConfigs) -> list[_Chosen]:
    """The modules that a configuration asks to quantize; members of a fused one go with it."""
    chosen: dict[nn.Module, _Chosen] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        qconfig = None if module in inside else _qconfig_of(module, qconfigs)
        if fused_owner(module) is not None:
            inside.update(module.children())
        if qconfig is not None:
            chosen.setdefault(module, _Chosen(module, [], qconfig)).names.append(name)
    return list(chosen.values())


def _is_static(chosen: _Chosen) -> bool:
    """Whether there is something to calibrate: neither a table nor quantized as values come."""
    return not is_float_embedding(chosen.module) and not is_dynamic(chosen.qconfig)


def _plan(chosen: Sequence[_Chosen]) -> _Plan:
    """What convert has to do with the chosen modules.

    Raises:
        BackendError: torch cannot quantize one of them; it is named.
    """
    plan = _Plan(classes=dict(tq.get_default_static_quant_module_mappings()))
    dynamic = tq.get_default_dynamic_quant_module_mappings()
    for module, names, qconfig in chosen:
        check_fused(names[0], module)
        if len(names) > 1:
            plan.shared.append(names)
        if is_float_embedding(module):
            check_quantizable(names[0], module, qconfig)
            plan.tables[names[0]] = qconfig
        elif is_dynamic(qconfig):
            _check_swappable(names[0], module, dynamic)
            plan.dynamic[names[0]] = qconfig
            plan.classes[type(module)] = dynamic[type(module)]
        else:
            _check_swappable(names[0], module, plan.classes)
    return plan


def _configure_static(
    model: nn.Module, chosen: Sequence[_Chosen], qconfigs: QConfigs
) -> tuple[nn.Module, dict[str, str]]:
    """Put qconfigs on static modules, and quantizers around them unless the model has stubs.

    Returns:
        The model, which may itself be wrapped, and the weight of each module -> where that is now.
    """
    own_stubs = any(isinstance(module, tq.QuantStub) for module in model.modules())
    static: dict[str, str] = {}
    for module, names, qconfig in chosen:
        module.qconfig = qconfig  # type: ignore[assignment]
        wrapped = not (own_stubs or isinstance(module, _MARKERS))
        if wrapped:
            model = _replace(model, names, tq.QuantWrapper(module))
        static |= {
            _weight_of(name, module): f"{name}.module" if wrapped else name for name in names
        }
    if own_stubs:
        _configure_markers(model, qconfigs)
    return model, static


def _qconfig_of(module: nn.Module, qconfigs: QConfigs) -> tq.QConfig | None:
    """The qconfig for a module; None where it stays in float."""
    classes: tuple[type, ...] = (type(module),)
    if is_float_embedding(module):
        classes = type(module).__mro__
    elif (owner := fused_owner(module)) is not None:
        classes = (type(module), type(owner))
    return next((qconfigs[kind] for kind in classes if kind in qconfigs), None)


def _check_qconfigs(qconfigs: Any) -> None:
    """Raise if a configuration is something else than module classes with qconfigs.

    Raises:
        BackendError: naming it.
    """
    if not isinstance(qconfigs, Mapping):
        raise BackendError(
            f"config: expected None or a mapping of module classes to qconfigs, found {qconfigs!r}"
        )
    for kind, qconfig in qconfigs.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise BackendError(f"config: expected module classes as keys, found {kind!r}")
        if not (qconfig is None or isinstance(qconfig, tq.QConfig)):
            raise BackendError(
                f"config: expected a qconfig or None for {kind.__name__}, found {qconfig!r}"
            )


def _check_swappable(name: str, module: nn.Module, classes: Mapping[Any, Any]) -> None:
    """Raise if torch would leave a weight in float that the configuration asks to quantize.

    Raises:
        BackendError: naming the module and its class.
    """
    holds_weights = any(parameter.ndim > 1 for parameter in module.parameters())
    if type(module) not in classes and holds_weights:
        raise BackendError(
            f"{name}: torch has no quantized class for a {type(module).__name__} with this "
            "qconfig; take it out of `config`, or use backend 'pt2e'"
        )


def _configure_markers(model: nn.Module, qconfigs: QConfigs) -> None:
    """Give users' own stubs the qconfig of the first static module that has one."""
    static = [
        module.qconfig
        for module in model.modules()
        if getattr(module, "qconfig", None) is not None and not isinstance(module, _MARKERS)
    ]
    for module in model.modules():
        if static and isinstance(module, _MARKERS) and type(module) not in qconfigs:
            module.qconfig = static[0]


def _weight_of(name: str, module: nn.Module) -> str:
    """FQN of the weight that a module holds, or that its first member does where it is fused."""
    fused = fused_owner(module) is not None
    return f"{name}.0.weight".removeprefix(".") if fused else f"{name}.weight".removeprefix(".")


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
