"""torchao's `quantize_`: weights become tensors that hold codes, modules stay what they are."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerAxis,
    quantize_,
)
from torchao.quantization.qat import QATConfig

from fx_sparsity.graph import WeightMap, WeightSite
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.patterns import Role
from fx_sparsity.quantization.any_use import Int8AnyUseConfig, int8_any_use, shared_axes
from fx_sparsity.quantization.backend import (
    Backend,
    BackendError,
    Prepared,
    Quantized,
    check_runs,
    check_unmasked,
    copied,
)
from fx_sparsity.quantization.grid import Grid
from fx_sparsity.quantization.torchao_saving import refuse_codes
from fx_sparsity.quantization.torchao_tensors import is_torchao
from fx_sparsity.sparsifier.hub_refusals import REFUSALS, guard_saving
from fx_sparsity.verification.stored import StoredWeight

logger = logging.getLogger("fx_sparsity")
REFUSALS.append(refuse_codes)

Names = tuple[str, ...]
"""Every FQN of one parameter of one module; several where the module is shared."""
Plan = Mapping[Names, AOBaseConfig]
Configs = Mapping[type[nn.Module] | str, AOBaseConfig | None]

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
FLOAT_CODES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
INTEGER_CODES = (torch.int8, torch.uint8)


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
        configs = _by_key(config, QAT_CONFIGS if qat else DEFAULT_CONFIGS)
        plan, left = _plan(prepared, configs, weights)
        planned = {name for names in plan for name in names}
        in_float = {
            fqn: next(left.get(name, _NO_PARAMETER) for name in site.names if name not in planned)
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


def _by_key(config: AOBaseConfig | Configs | None, default: Configs) -> Configs:
    """What the user gave, as a mapping.

    Raises:
        BackendError: something else than keys and configurations.
    """
    if config is None:
        return default
    if isinstance(config, FqnToConfig):
        config = {
            nn.Linear if key == "_default" else key: value
            for key, value in config.fqn_to_config.items()
        }
    elif isinstance(config, AOBaseConfig):
        config = {nn.Linear: config}
    if not isinstance(config, Mapping):
        raise BackendError(
            f"config: expected one of torchao's configurations or a mapping to them, found {config}"
        )
    for key, value in config.items():
        is_class = isinstance(key, type) and issubclass(key, nn.Module)
        if not (is_class or isinstance(key, str)):
            raise BackendError(f"config: expected module classes and names as keys, found {key!r}")
        if not (value is None or isinstance(value, AOBaseConfig)):
            raise BackendError(
                f"config: expected None or one of torchao's configurations for {key!r}, "
                f"found {value!r}"
            )
    return config


_NO_PARAMETER = "it is computed, and no parameter of the model by itself"
_NO_KEY = "no key of `config` names it"
_EXCLUDED = "`config` has None for it"
_RENORMALIZED = "its lookups renormalize it (max_norm), and codes cannot be written to"


def _plan(
    model: nn.Module, configs: Configs, weights: WeightMap
) -> tuple[dict[Names, AOBaseConfig], dict[str, str]]:
    """Which parameters get which configuration, and why the others get none, by each name.

    Raises:
        BackendError: a key names no parameter of two or more dimensions, and no owner of one; or
            `Int8AnyUseConfig` for one whose axes are not known.
    """
    held: dict[tuple[int, str], list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = module
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                fqn = f"{prefix}.{attribute}".removeprefix(".")
                held.setdefault((id(module), attribute), []).append(fqn)
    sites = weights.by_any_name()
    plan: dict[Names, AOBaseConfig] = {}
    left: dict[str, str] = {}
    used: set[type[nn.Module] | str] = set()
    for (module_id, attribute), names in held.items():
        module = modules[module_id]
        site = next((sites[name] for name in names if name in sites), None)
        keys = _matching(configs, module, attribute, names)
        if site is not None and nn.Module in configs:
            keys.append(nn.Module)
        used.update(keys)
        chosen = configs[keys[0]] if keys else None
        if chosen is None:
            left |= dict.fromkeys(names, _EXCLUDED if keys else _NO_KEY)
        elif keys[0] is nn.Module and getattr(module, "max_norm", None) is not None:
            left |= dict.fromkeys(names, _RENORMALIZED)
        else:
            plan[tuple(names)] = _with_axes(names[0], chosen, site)
    if unused := [key for key in configs if isinstance(key, str) and key not in used]:
        raise BackendError(
            f"config: {', '.join(unused)} names no parameter of two or more dimensions of this "
            f"{type(model).__name__}, nor a module with such a weight"
        )
    return plan, left


def _with_axes(name: str, config: AOBaseConfig, site: WeightSite | None) -> AOBaseConfig:
    """A configuration that knows which axes share a scale.

    Raises:
        BackendError: nothing tells.
    """
    if not isinstance(config, Int8AnyUseConfig) or config.shared is not None:
        return config
    if site is None:
        raise BackendError(
            f"{name}: no operator is known to read it as a weight, so that nothing tells which of "
            "its axes share a scale; give them as Int8AnyUseConfig(shared=...), or exclude it with "
            "None in `config`"
        )
    return replace(config, shared=shared_axes(site.roles))


def _matching(
    configs: Configs, module: nn.Module, attribute: str, names: list[str]
) -> list[type[nn.Module] | str]:
    """The keys that name a parameter, but for `nn.Module`; the most specific first."""
    owners = [name.rpartition(".")[0] for name in names] if attribute == "weight" else []
    patterns = [key for key in configs if isinstance(key, str) and key.startswith("re:")]
    keys: list[type[nn.Module] | str] = [name for name in (*names, *owners) if name in configs]
    for candidates in (names, owners):
        keys += [
            pattern
            for pattern in patterns
            if any(re.fullmatch(pattern.removeprefix("re:"), name) for name in candidates)
        ]
    if attribute == "weight" and not isinstance(module, NonDynamicallyQuantizableLinear):
        keys += [base for base in type(module).__mro__ if base in configs and base is not nn.Module]
    return keys


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
        _mend_empty_scales(weight)
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


@torch.no_grad()
def _mend_empty_scales(weight: Any) -> None:
    """Make zeros of blocks that are all zero: torchao divides them by a float8 scale of zero."""
    if _has_codes(weight) and weight.qdata.dtype in FLOAT_CODES:
        empty = weight.scale == 0
        weight.scale.masked_fill_(empty, 1)
        codes = weight.qdata.to(torch.float32)
        weight.qdata.copy_(codes.masked_fill(_spread(empty, codes.shape), 0))


def tensor_of_codes(codes: Tensor, scales: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """One of torchao's weight-only tensors, of codes and scales as they are.

    Codes of 8 bits with one scale a row are what `Int8WeightOnlyConfig` makes, whose scales are
    float32; others what `IntxWeightOnlyConfig` does.

    Args:
        codes: int8 [out, in].
        scales: float32 [out, groups], where groups divide a row.
        grid: that they are of.
        dtype: that the tensor stands for.
    """
    width = codes.shape[1]
    if grid.bits == 8 and scales.shape[1] == 1:
        zeros = torch.zeros_like(scales, dtype=torch.int8)
        return Int8Tensor(codes, scales, [1, width], dtype, zero_point=zeros)
    scales = scales.to(grid.scale_dtype)
    return IntxUnpackedToInt8Tensor(
        codes,
        scales,
        torch.zeros_like(scales, dtype=torch.int8),
        getattr(torch, f"int{grid.bits}"),
        (1, width // scales.shape[1]),
        dtype,
        None,
    )


def read_tensor(fqn: str, tensor: Any, roles: tuple[Role, ...] | None = None) -> StoredWeight:
    """One of torchao's tensors, under the name `fqn`.

    Integer codes are read as they are. Float8 codes are read as their values, which float32 holds
    exactly; both of their zeros are zero. `(code - zero_point) * scale`, rounded to the dtype of
    the tensor, is what its own `dequantize` returns. Tensors that keep codes in another layout,
    such as packed 4-bit ones, are read as an `obstacle`, and nothing about their values is known.

    Args:
        fqn: of the parameter or buffer that holds it.
        tensor: as `is_torchao` has it.
        roles: of its axes, where they are known.
    """
    if not _has_codes(tensor):
        kind = type(tensor).__name__

        def refuse(values: Tensor) -> None:
            raise BackendError(f"{fqn}: codes of a {kind} cannot be written")

        return StoredWeight(
            fqn,
            fqn,
            kind,
            "layout of its own",
            torch.full((), torch.nan, device=tensor.device).expand(tensor.shape),
            refuse,
            scale=torch.ones((), device=tensor.device),
            zero_point=torch.zeros((), device=tensor.device),
            obstacle=f"codes of a {kind} cannot be read",
            roles=roles,
        )
    codes: Tensor = tensor.qdata
    scale: Tensor = tensor.scale
    zero_point = getattr(tensor, "zero_point", None)
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=torch.int8)

    @torch.no_grad()
    def write(values: Tensor) -> None:
        codes.copy_(values)

    in_float = codes.dtype in FLOAT_CODES
    dtype = getattr(tensor, "target_dtype", codes.dtype)
    return StoredWeight(
        fqn,
        fqn,
        str(dtype).removeprefix("torch."),
        _scheme(codes, scale, zero_point),
        codes.detach().to(torch.float32) if in_float else codes.detach().clone(),
        write,
        _spread(scale.detach(), codes.shape),
        _spread(zero_point.detach(), codes.shape),
        None if in_float else _code_range(dtype, getattr(tensor, "reduce_range", False)),
        roles=roles,
    )


def _has_codes(tensor: Any) -> bool:
    """Whether a tensor stores one code an element, with scales that tile it."""
    codes, scale = getattr(tensor, "qdata", None), getattr(tensor, "scale", None)
    return (
        isinstance(codes, Tensor)
        and isinstance(scale, Tensor)
        and codes.dtype in (*INTEGER_CODES, *FLOAT_CODES)
        and codes.shape == tensor.shape
        and scale.ndim == codes.ndim
        and all(n and size % n == 0 for size, n in zip(codes.shape, scale.shape, strict=True))
    )


def _spread(values: Tensor, shape: torch.Size) -> Tensor:
    """Values of blocks, broadcastable against a tensor of `shape` that the blocks tile."""
    for dim, (blocks, size) in enumerate(zip(values.shape, shape, strict=True)):
        if 1 < blocks < size:
            values = values.repeat_interleave(size // blocks, dim)
    return values


def _scheme(codes: Tensor, scale: Tensor, zero_point: Tensor) -> str:
    """Such as `per-group symmetric, 1x32`."""
    kind = "float" if zero_point.is_floating_point() else "integer"
    mapping = f"affine ({kind} zero point)" if bool(zero_point.any()) else "symmetric"
    block = [size // n for size, n in zip(codes.shape, scale.shape, strict=True)]
    split = [dim for dim, blocks in enumerate(scale.shape) if blocks > 1]
    if not split:
        return f"per-tensor {mapping}"
    if len(split) == 1 and block[split[0]] == 1:
        return f"per-channel {mapping}, axis {split[0]}"
    return f"per-group {mapping}, {'x'.join(map(str, block))}"


def _code_range(dtype: torch.dtype, reduced: bool) -> tuple[int, int]:
    """Smallest and largest code of an integer dtype, of 1 to 8 bits; halved where reduced."""
    name = str(dtype).removeprefix("torch.")
    levels = 2 ** int(name.removeprefix("u").removeprefix("int"))
    low, high = (0, levels - 1) if name.startswith("u") else (-levels // 2, levels // 2 - 1)
    return (low // 2, high // 2) if reduced else (low, high)
