"""Which parameters get which of torchao's configurations: what keys come to on a model."""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig

from fx_sparsity.graph import WeightMap, WeightSite
from fx_sparsity.quantization.any_use import Int8AnyUseConfig, shared_axes
from fx_sparsity.quantization.backend import BackendError

Names = tuple[str, ...]
"""Every FQN of one parameter of one module; several where the module is shared."""
Plan = Mapping[Names, AOBaseConfig]
Configs = Mapping[type[nn.Module] | str, AOBaseConfig | None]


def by_key(config: AOBaseConfig | Configs | None, default: Configs) -> Configs:
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


NO_PARAMETER = "it is computed, and no parameter of the model by itself"
_NO_KEY = "no key of `config` names it"
_EXCLUDED = "`config` has None for it"
_RENORMALIZED = "its lookups renormalize it (max_norm), and codes cannot be written to"


def planned_configs(
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
