"""Which weight gets which sparsity: the shape of quantization's `QConfigMapping`, on weights."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.weight_map import WeightMap, WeightSite
from fx_sparsity.patterns import PatternError, SparsityConfig
from fx_sparsity.reports import format_table

Wish = SparsityConfig | str | None
"""A configuration, a string that `SparsityConfig.parse` reads, or None to leave a weight dense."""
Rule = Callable[[WeightSite], Wish]
"""Says of a weight what its configuration is."""


class MappingError(FxSparsityError, ValueError):
    """A mapping does not fit a model: an unknown name, or a pattern that a weight cannot take."""


@dataclass(frozen=True)
class Assignment(Mapping[str, SparsityConfig]):
    """What a mapping comes to on one model.

    Attributes:
        configs: FQN -> configuration of every weight that is to be masked.
        dense: FQN -> why it is not, for the other weights of the map.
        unmatched: entries of the mapping that speak of no weight, such as `regex 'mlp'`.
    """

    configs: Mapping[str, SparsityConfig]
    dense: Mapping[str, str]
    unmatched: tuple[str, ...] = ()

    def __getitem__(self, fqn: str) -> SparsityConfig:
        return self.configs[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    def __str__(self) -> str:
        rows = [(fqn, str(config)) for fqn, config in self.configs.items()]
        rows += [(fqn, f"dense: {why}") for fqn, why in self.dense.items()]
        text = format_table(("weight", "sparsity"), rows)
        return "\n".join([text, *(f"no weight matches {entry}" for entry in self.unmatched)])


class SparsityMapping:
    """Which weights get which configuration; the most specific entry wins, None excludes.

    From the least to the most specific: `set_global` or `set_rule`, `set_object_type`,
    `set_module_name_regex` (the first that matches), `set_module_name`. Every setter takes a
    `SparsityConfig`, a string such as `"2:4"` or `"unstructured 50%"`, or None, and returns the
    mapping.
    """

    def __init__(self) -> None:
        self._rest: SparsityConfig | Rule | None = None
        self._types: dict[str, SparsityConfig | None] = {}
        self._regexes: dict[str, SparsityConfig | None] = {}
        self._names: dict[str, SparsityConfig | None] = {}

    def set_global(self, config: Wish) -> "SparsityMapping":
        """For every weight that nothing else speaks of; takes the place of a rule."""
        self._rest = _parse(config)
        return self

    def set_rule(self, rule: "Rule") -> "SparsityMapping":
        """For every weight that nothing else speaks of, by a function; replaces `set_global`.

        Args:
            rule: called with each `WeightSite`; what it returns is that weight's configuration.

        Raises:
            TypeError: `rule` cannot be called.
        """
        if not callable(rule):
            raise TypeError(f"rule: expected a function of a site, found {type(rule).__name__}")
        self._rest = rule
        return self

    def set_object_type(self, kind: type[nn.Module] | str, config: Wish) -> "SparsityMapping":
        """For weights owned by modules of a class, or of a kind in the `WeightMap` ("linear")."""
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        self._types[name] = _parse(config)
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

    def to_dict(self) -> dict[str, Any]:
        """The mapping as a dict of strings, which JSON and YAML can hold; see `from_dict`.

        Raises:
            MappingError: the mapping has a rule, which no string can stand for.
        """
        if callable(self._rest):
            raise MappingError("a mapping with a rule cannot be written down; name the weights")
        return {
            "global": _text(self._rest),
            "object_type": {kind: _text(config) for kind, config in self._types.items()},
            "module_name_regex": {regex: _text(c) for regex, c in self._regexes.items()},
            "module_name": {name: _text(config) for name, config in self._names.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SparsityMapping":
        """Read what `to_dict` wrote; every key may be left out.

        Raises:
            MappingError: an unknown key.
            PatternError: a configuration that cannot be read.
        """
        setters = {
            "object_type": cls.set_object_type,
            "module_name_regex": cls.set_module_name_regex,
            "module_name": cls.set_module_name,
        }
        if unknown := set(data) - {"global", *setters}:
            raise MappingError(
                f"unknown key {min(unknown)!r}; expected {', '.join(('global', *setters))}"
            )
        mapping = cls().set_global(data.get("global"))
        for key, setter in setters.items():
            for name, config in data.get(key, {}).items():
                setter(mapping, name, config)
        return mapping

    def resolve(self, weights: WeightMap, *, partial: bool = False) -> Assignment:
        """Apply the mapping to the weights of a model.

        Args:
            weights: of the model.
            partial: they are some of its weights, so that names may be those of others.

        Raises:
            MappingError: a name that no weight has (with the nearest that exist), or weights that
                cannot take their pattern; all of them are named.
        """
        if not partial:
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
        return Assignment(configs, dense, tuple(self._unmatched(weights)))

    def names(self, site: WeightSite) -> bool:
        """Whether an entry of `set_module_name` speaks of a weight or its owner."""
        fqns = {site.fqn, *site.aliases}
        return not self._names.keys().isdisjoint(fqns | {f.rpartition(".")[0] for f in fqns})

    def _lookup(self, site: WeightSite) -> tuple[SparsityConfig | None, str]:
        fqns = {site.fqn, *site.aliases}
        for names in (fqns, {fqn.rpartition(".")[0] for fqn in fqns}):
            for name, config in self._names.items():
                if name in names:
                    return config, f"excluded by name {name!r}"
        for regex, config in self._regexes.items():
            if _has_name(site, regex):
                return config, f"excluded by regex {regex!r}"
        for name, config in self._types.items():
            if _has_type(site, name):
                return config, f"excluded by type {name!r}"
        if callable(self._rest):
            return _parse(self._rest(site)), "excluded by the rule"
        return self._rest, "no entry of the mapping speaks of it"

    def _unmatched(self, weights: WeightMap) -> Iterator[str]:
        for what, entries, matches in (
            ("regex", self._regexes, _has_name),
            ("type", self._types, _has_type),
        ):
            for entry in entries:
                if not any(matches(site, entry) for site in weights.sites):
                    yield f"{what} {entry!r}"

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


def _has_name(site: WeightSite, regex: str) -> bool:
    return any(re.match(regex, fqn) for fqn in (site.fqn, *site.aliases))


def _has_type(site: WeightSite, name: str) -> bool:
    return name in (site.kind, site.owner_type)


def _text(config: SparsityConfig | None) -> str | None:
    return None if config is None else str(config)


def _parse(config: Wish) -> SparsityConfig | None:
    return None if config is None else SparsityConfig.parse(config)
