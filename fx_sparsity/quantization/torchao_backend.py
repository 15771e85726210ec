"""torchao's `quantize_`: weights become tensors that hold codes, modules stay what they are."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    quantize_,
)
from torchao.quantization.qat import QATConfig

from fx_sparsity.graph import WeightMap
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.patterns import Role
from fx_sparsity.quantization.any_use import Int8AnyUseConfig, int8_any_use
from fx_sparsity.quantization.backend import (
    Backend,
    BackendError,
    Prepared,
    Quantized,
    check_runs,
    check_unmasked,
    copied,
)
from fx_sparsity.quantization.torchao_codes import mend_empty_scales, read_tensor
from fx_sparsity.quantization.torchao_configs import (
    NO_PARAMETER,
    Configs,
    Names,
    Plan,
    by_key,
    planned_configs,
)
from fx_sparsity.quantization.torchao_saving import refuse_codes
from fx_sparsity.quantization.torchao_tensors import is_torchao
from fx_sparsity.sparsifier.hub_refusals import REFUSALS, guard_saving
from fx_sparsity.verification.stored import StoredWeight

logger = logging.getLogger("fx_sparsity")
REFUSALS.append(refuse_codes)

EMBEDDING_CONFIG = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
"""8-bit embeddings, one symmetric scale a row."""
DEFAULT_CONFIGS: Configs = {
    nn.Linear: Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    nn.Embedding: EMBEDDING_CONFIG,
    nn.Module: Int8AnyUseConfig(),
}
QAT_CONFIGS: Configs = {
    nn.Linear: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=PerAxis(0)
    ),
    nn.Embedding: EMBEDDING_CONFIG,
    nn.Module: Int8AnyUseConfig(),
}
"""As `DEFAULT_CONFIGS`, of what torchao can train."""

OWNER_ROLES: dict[type[nn.Module], tuple[Role, ...]] = {
    nn.Linear: ("out", "in"),
    nn.Embedding: ("row", "dim"),
}


class TorchAOBackend(Backend):
    """`config` is one of torchao's configurations, for linears; or a mapping to them.

    The keys of a mapping, the most specific wins:

    | key | |
    | --- | --- |
    | `"blocks.0.experts"` | a parameter by its FQN, of any number of dimensions |
    | `"blocks.0.up"` | a module, for its parameter `weight` |
    | `"re:.*head"` | a regular expression that matches either in full |
    | `nn.Linear` | a class and its subclasses, for their parameter `weight` |
    | `nn.Module` | every other weight that discovery found, whatever it is called |

    A value is one of torchao's configurations; or `Int8AnyUseConfig`, for what torchao's tensors
    cannot be used by: embedding bags, convolutions, matrix products such as those of a `Conv1D` of
    transformers, experts, and what a parametrization is computed from. Or None, which leaves what
    the key names in float. `FqnToConfig` is taken as such a mapping, its `"_default"` for linears.

    None for `config` is `DEFAULT_CONFIGS`: int8 linears whose activations are quantized as they
    come, 8-bit embeddings, and `Int8AnyUseConfig` for the rest. For training it is `QAT_CONFIGS`:
    of int8 linears, torchao has fake quantization for its `Intx` ones only. Weights of
    `Int8AnyUseConfig` are trained in float, and rounded when converting.

    What no key names stays in float and is not `meant`, and `in_float` says so. `nn.Linear` is no
    key of the output of `nn.MultiheadAttention`, whose class says that it cannot be quantized. A
    subclass of `nn.Linear` with a forward of its own is quantized as its base is, which a warning
    tells. A tied weight is quantized at each of its places by the configuration there, and is
    `meant` where all of them have one; the tie ends, but between places of `Int8AnyUseConfig`.
    """

    name = "torchao"
    observes = False

    @torch.random.fork_rng()
    def prepare(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weights: WeightMap,
        *,
        config: AOBaseConfig | Configs | None = None,
        dynamic_shapes: Any = None,
        qat: bool = False,
    ) -> Prepared:
        """See `Backend.prepare`. Names do not move, and nothing is exported.

        For training, the whole conversion is tried first on a copy, so that what torchao cannot
        convert is known before and not after.

        Raises:
            BackendError: live masks; a key that names nothing; or a weight that torchao cannot
                train. It names the weight, its configuration, and torchao's reason.
        """
        del dynamic_shapes
        check_unmasked(model)
        prepared = copied(model, training=None if qat else False)
        configs = by_key(config, QAT_CONFIGS if qat else DEFAULT_CONFIGS)
        plan, left = planned_configs(prepared, configs, weights)
        planned = {name for names in plan for name in names}
        in_float = {
            fqn: next(left.get(name, NO_PARAMETER) for name in site.names if name not in planned)
            for fqn, site in weights.items()
            if not planned.issuperset(site.names)
        }
        meant = frozenset(weights) - frozenset(in_float)
        if qat:
            check_runs(_quantized(copied(prepared), plan), example_inputs)
            for names, base in plan.items():
                if not isinstance(base, Int8AnyUseConfig):
                    owner = prepared.get_submodule(names[0].rpartition(".")[0])
                    _check_replaceable(names[0], owner)
                    prepared = _apply(prepared, names, QATConfig(base, step="prepare"))
                    plan[names] = QATConfig(base, step="convert")
        else:
            _tell_own_forwards(prepared, plan)
        return Prepared(prepared, meant, config=plan, in_float=in_float)

    @torch.random.fork_rng()
    def convert(self, prepared: Prepared, example_inputs: ExampleInputs) -> Quantized:
        """See `Backend.convert`.

        Raises:
            BackendError: a weight that torchao cannot quantize, or leaves in float; it names the
                weight, its configuration, and torchao's reason. Or what comes out does not run.
        """
        model = _quantized(prepared.model, prepared.config)
        nn.Module.train(model, False)  # not `.eval()`, which exported graphs refuse
        check_runs(model, example_inputs)
        guard_saving(model)
        return Quantized(model, prepared.meant, prepared.in_float)

    def read(self, model: nn.Module) -> Iterator[StoredWeight]:
        """See `Backend.read`: every parameter and buffer that is one of torchao's tensors."""
        for prefix, module in model.named_modules(remove_duplicate=False):
            roles = next((OWNER_ROLES[c] for c in type(module).__mro__ if c in OWNER_ROLES), None)
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                if is_torchao(tensor):
                    yield read_tensor(
                        f"{prefix}.{attribute}".removeprefix("."),
                        tensor,
                        roles if attribute == "weight" else None,
                    )


def _name(config: AOBaseConfig) -> str:
    """What a configuration is, without its arguments; and what training is for."""
    name = type(config).__name__
    if isinstance(config, QATConfig) and config.base_config is not None:
        return f"{name} of {_name(config.base_config)}"
    return name


def _tell_own_forwards(model: nn.Module, plan: Plan) -> None:
    """Say which linear layers may do more than `nn.Linear` with a weight that is quantized."""
    own: dict[str, list[str]] = {}
    for names, config in plan.items():
        module = model.get_submodule(names[0].rpartition(".")[0])
        plain = type(module).forward is nn.Linear.forward
        if isinstance(module, nn.Linear) and not plain and not isinstance(config, Int8AnyUseConfig):
            own.setdefault(type(module).__name__, []).append(names[0])
    for kind, names_of in own.items():
        logger.warning(
            "%s: torchao quantizes what F.linear computes there, though %s has a forward of its "
            "own; whatever else that does with the weight is not quantized, or refused",
            ", ".join(names_of),
            kind,
        )


def _quantized(model: nn.Module, plan: Plan) -> nn.Module:
    """Carry a plan out, in place.

    Raises:
        BackendError: as `TorchAOBackend.convert`.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for names, config in plan.items():
        if isinstance(config, Int8AnyUseConfig):
            _round_in_place(model, names[0], config, made)
            continue
        model = _apply(model, names, config)
        owner, _, attribute = names[0].rpartition(".")
        weight = getattr(model.get_submodule(owner), attribute)
        if not is_torchao(weight):
            raise BackendError(
                f"{names[0]}: torchao leaves a weight of shape {tuple(weight.shape)} and "
                f"{weight.dtype} in float, with {config}; exclude it with None in `config`"
            )
        mend_empty_scales(weight)
    return model


def _round_in_place(
    model: nn.Module,
    name: str,
    config: Int8AnyUseConfig,
    made: dict[int, tuple[nn.Parameter, nn.Parameter]],
) -> None:
    """Put 8-bit codes in the place of one parameter.

    Args:
        model: that holds it.
        name: of the parameter.
        config: with axes.
        made: parameters that were rounded before, by `id`, which stay tied: kept alive, and codes.

    Raises:
        BackendError: NaN or infinite values, or axes that it has not.
    """
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = module._parameters[attribute]
    assert weight is not None
    assert config.shared is not None
    if id(weight) not in made:
        try:
            codes = int8_any_use(weight, config.shared)
        except (ValueError, IndexError) as error:
            raise BackendError(
                f"{name}: {error}; mend it, or exclude it with None in `config`"
            ) from error
        made[id(weight)] = weight, nn.Parameter(codes, requires_grad=False)
    module._parameters[attribute] = made[id(weight)][1]


def _apply(model: nn.Module, names: Names, config: AOBaseConfig) -> nn.Module:
    """Run `quantize_` on one parameter. Returns the model, which is another if that was its root.

    Raises:
        BackendError: torchao cannot.
    """
    owner, _, attribute = names[0].rpartition(".")
    module = model.get_submodule(owner)
    # `quantize_` replaces modules in their parents, and so no root: every module gets a parent.
    parent = nn.Sequential(module)
    target = "0" if attribute == "weight" else f"0.{attribute}"
    try:
        quantize_(parent, FqnToConfig({target: config}), filter_fn=None)
    except Exception as error:
        raise BackendError(
            f"{names[0]}: torchao cannot apply {_name(config)}: {type(error).__name__}: {error}; "
            f"exclude it with None in `config`, or use another configuration than {config}"
        ) from error
    new = parent[0]
    # torchao hangs a method on the module that cannot be pickled and keeps a copy's source alive.
    new.__dict__.pop("extra_repr", None)
    if new is module:
        return model
    new.train(module.training)
    if not owner:
        return new
    for name in names:
        model.set_submodule(name.rpartition(".")[0], new)
    return model


def _check_replaceable(name: str, module: nn.Module) -> None:
    """Raise if a module does more than the one that torchao trains in its place.

    Raises:
        BackendError: a subclass with a forward of its own.
    """
    for base in (nn.Linear, nn.Embedding):
        if isinstance(module, base) and type(module).forward is not base.forward:
            raise BackendError(
                f"{name}: torchao trains a plain {base.__name__} instead, and the forward of "
                f"{type(module).__name__} would be lost; exclude it with None in `config`"
            )
