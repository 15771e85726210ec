"""Which weight gets which sparsity: the shape of quantization's `QConfigMapping`, on weights."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from fx_sparsity.graph.weight_map import WeightMap, WeightSite
from fx_sparsity.patterns import PatternError, SparsityConfig
from fx_sparsity.tables import format_table

Wish = SparsityConfig | str | None
"""A configuration, a string that `SparsityConfig.parse` reads, or None to leave a weight dense."""


class MappingError(ValueError):
    """A mapping does not fit a model: an unknown name, or a pattern that a weight cannot take."""


@dataclass(frozen=True)
class Assignment(Mapping[str, SparsityConfig]):
    """What a mapping comes to on one model.

    Attributes:
        configs: FQN -> configuration of every weight that is to be masked.
        dense: FQN -> why it is not, for the other weights of the map.
    """

    configs: Mapping[str, SparsityConfig]
    dense: Mapping[str, str]

    def __getitem__(self, fqn: str) -> SparsityConfig:
        return self.configs[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    def __str__(self) -> str:
        rows = [(fqn, str(config)) for fqn, config in self.configs.items()]
        rows += [(fqn, f"dense: {why}") for fqn, why in self.dense.items()]
        return format_table(("weight", "sparsity"), rows)


class SparsityMapping:
    """Which weights get which configuration; the most specific entry wins, None excludes.

    From the least to the most specific: `set_global`, `set_object_type`, `set_module_name_regex`
    (the first that matches), `set_module_name`. Every setter takes a `SparsityConfig`, a string
    such as `"2:4"` or `"unstructured 50%"`, or None, and returns the mapping.
    """

    def __init__(self) -> None:
        self._global: SparsityConfig | None = None
        self._types: dict[type[nn.Module] | str, SparsityConfig | None] = {}
        self._regexes: dict[str, SparsityConfig | None] = {}
        self._names: dict[str, SparsityConfig | None] = {}

    def set_global(self, config: Wish) -> "SparsityMapping":
        """For every weight that nothing else speaks of."""
        self._global = _parse(config)
        return self

    def set_object_type(self, kind: type[nn.Module] | str, config: Wish) -> "SparsityMapping":
        """For weights owned by modules of a class, or of a kind in the `WeightMap` ("linear")."""
        self._types[kind] = _parse(config)
        return self

    def set_module_name_regex(self, regex: str, config: Wish) -> "SparsityMapping":
        """For weights whose FQN the expression matches from its start, as `re.match` does."""
        re.compile(regex)
        self._regexes[regex] = _parse(config)
        return self

    def set_module_name(self, name: str, config: Wish) -> "SparsityMapping":
        """For one weight, by its FQN or that of the module that owns it."""
        self._names[name] = _parse(config)
        return self

    def resolve(self, weights: WeightMap) -> Assignment:
        """Apply the mapping to the weights of a model.

        Raises:
            MappingError: a name that no weight has (with the nearest that exist), or weights that
                cannot take their pattern; all of them are named.
        """
        self._check_names(weights)
        configs: dict[str, SparsityConfig] = {}
        dense: dict[str, str] = {}
        misfits: list[str] = []
        for site in weights.sites:
            config, why = self._lookup(site)
            if config is None:
                dense[site.fqn] = why
                continue
            configs[site.fqn] = config
            try:
                config.pattern.tiling(site.shape, site.roles)
            except PatternError as error:
                misfits.append(f"{site.fqn}: {error}")
        if misfits:
            raise MappingError("\n".join(misfits))
        return Assignment(configs, dense)

    def _lookup(self, site: WeightSite) -> tuple[SparsityConfig | None, str]:
        names = {site.fqn, site.owner, *site.aliases}
        names |= {alias.rpartition(".")[0] for alias in site.aliases}
        for name, config in self._names.items():
            if name in names:
                return config, f"excluded by name {name!r}"
        for regex, config in self._regexes.items():
            if any(re.match(regex, fqn) for fqn in (site.fqn, *site.aliases)):
                return config, f"excluded by regex {regex!r}"
        for kind, config in self._types.items():
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            if name in (site.kind, site.owner_type):
                return config, f"excluded by type {name!r}"
        return self._global, "no entry of the mapping speaks of it"

    def _check_names(self, weights: WeightMap) -> None:
        fqns = [fqn for site in weights.sites for fqn in (site.fqn, *site.aliases)]
        known = {*fqns, *(fqn.rpartition(".")[0] for fqn in fqns)}
        for name in self._names:
            if name in known:
                continue
            left_out = {u.fqn: u.reason for u in weights.unclaimed}
            if name in left_out:
                raise MappingError(f"{name!r} is not a weight that can be masked: {left_out[name]}")
            near = get_close_matches(name, sorted(known), n=3)
            hint = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
            raise MappingError(f"the model has no weight or owning module {name!r}{hint}")


def _parse(config: Wish) -> SparsityConfig | None:
    return None if config is None else SparsityConfig.parse(config)
