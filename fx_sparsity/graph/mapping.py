"""Which weight gets which sparsity: the shape of quantization's `QConfigMapping`, on weights."""

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.selector import Selector, matches, names_of, type_name
from fx_sparsity.graph.weight_map import WeightMap, WeightSite
from fx_sparsity.patterns import NM, Block, Pattern, PatternError, SparsityConfig
from fx_sparsity.reports import Table, Tabular

Config = SparsityConfig | str | None
"""A configuration, a string that `SparsityConfig.parse` reads, or None to leave a weight dense."""
Rule = Callable[[WeightSite], Config]
"""Says of a weight what its configuration is."""


class MappingError(FxSparsityError, ValueError):
    """A mapping does not fit a model: an unknown name, or a pattern that a weight cannot take."""


@dataclass(frozen=True)
class Assignment(Tabular, Mapping[str, SparsityConfig]):
    """What a mapping comes to on one model.

    Attributes:
        configs: FQN -> configuration of every weight that is to be masked.
        dense: FQN -> the reason why it stays dense, for the other weights of the map.
        unmatched: entries of the mapping that speak of no weight, such as `regex 'mlp'`.
    """

    configs: Mapping[str, SparsityConfig]
    dense: Mapping[str, str]
    unmatched: tuple[str, ...] = ()

    def among(self, fqns: Container[str]) -> "Assignment":
        """The same for some of the weights."""
        configs = {fqn: config for fqn, config in self.configs.items() if fqn in fqns}
        return replace(self, configs=configs)

    def __getitem__(self, fqn: str) -> SparsityConfig:
        return self.configs[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    @property
    def tables(self) -> tuple[Table, ...]:
        """A row a weight."""
        rows = [(fqn, str(config)) for fqn, config in self.configs.items()]
        rows += [(fqn, f"dense: {reason}") for fqn, reason in self.dense.items()]
        return (Table(("weight", "sparsity"), rows),)

    @property
    def summary(self) -> str:
        """How many weights are to be masked, and which entries speak of none."""
        told = f"{len(self)} of {len(self) + len(self.dense)} weights are to be masked"
        return "; ".join([told, *(f"no weight matches {entry}" for entry in self.unmatched)])

    def __str__(self) -> str:
        (table,) = self.tables
        return "\n".join([str(table), *(f"no weight matches {entry}" for entry in self.unmatched)])


class SparsityMapping:
    """Which weights get which configuration; the most specific entry wins, None excludes.

    From the least to the most specific: `set_global` or `set_rule`, `set_object_type` (a class says
    more than a kind), `set_module_name_regex` (the first that matches), `set_module_name`. Every
    setter takes a `SparsityConfig`, a string such as `"2:4"` or `"unstructured 50%"`, or None, and
    returns the mapping.

    Whatever takes a mapping takes a string for every weight, and what `from_dict` reads, too.
    """

    def __init__(self) -> None:
        self._rest: SparsityConfig | Callable[[WeightSite], SparsityConfig | None] | None = None
        self._entries: Selector[SparsityConfig | None] = Selector()

    def set_global(self, config: Config) -> "SparsityMapping":
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
        self._rest = lambda site: _parse(rule(site))
        return self

    def set_object_type(self, kind: type[nn.Module] | str, config: Config) -> "SparsityMapping":
        """For weights owned by modules of a class, or of a kind in the `WeightMap` ("linear")."""
        self._entries.types[type_name(kind)] = _parse(config)
        return self

    def set_module_name_regex(self, regex: str, config: Config) -> "SparsityMapping":
        """For weights whose FQN, or whose owner's, the expression matches from its start.

        As `re.match` does, and `QConfigMapping` with the names of modules.
        """
        re.compile(regex)
        self._entries.regexes[regex] = _parse(config)
        return self

    def set_module_name(self, name: str, config: Config) -> "SparsityMapping":
        """For one weight, by its FQN or that of the module that owns it."""
        self._entries.names[name] = _parse(config)
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
            "object_type": {kind: _text(config) for kind, config in self._entries.types.items()},
            "module_name_regex": {regex: _text(c) for regex, c in self._entries.regexes.items()},
            "module_name": {name: _text(config) for name, config in self._entries.names.items()},
        }

    @classmethod
    def of(cls, mapping: "MappingLike") -> "SparsityMapping":
        """A mapping as it is; a string as the configuration of every weight; a dict by `from_dict`.

        Raises:
            MappingError: an unknown key, or something else.
            PatternError: a configuration that cannot be read.
        """
        if isinstance(mapping, cls):
            return mapping
        if isinstance(mapping, str | SparsityConfig):
            return cls().set_global(mapping)
        if isinstance(mapping, Mapping):
            return cls.from_dict(mapping)
        raise MappingError(
            "mapping: expected a SparsityMapping, a string such as '2:4' or a dict such as "
            f"{{'object_type': {{'linear': '2:4'}}}}, found {type(mapping).__name__}"
        )

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

        A weight whose zeros do not survive on the way to its operators stays dense, unless an entry
        names it.

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
            config, reason = self._lookup(site)
            if config is None:
                dense[site.fqn] = reason
                continue
            if site.lost_zeros and not self.names(site):
                dense[site.fqn] = site.lost_zeros
                continue
            configs[site.fqn] = config
            try:
                _check_pattern(config.pattern, site)
            except PatternError as error:
                misfits.append(f"{site.fqn}: {error}")
        if misfits:
            raise MappingError("\n".join(misfits))
        return Assignment(configs, dense, self.unmatched(weights))

    def names(self, site: WeightSite) -> bool:
        """Whether an entry of `set_module_name` speaks of a weight or its owner."""
        found = self._entries.select(site.names)
        return found is not None and found.by_name

    def unmatched(self, weights: WeightMap) -> tuple[str, ...]:
        """Entries that speak of none of some weights, in words such as `regex 'mlp'`."""
        fqns = [fqn for site in weights.sites for fqn in site.names]
        types = {kind for site in weights.sites for kind in _types(site)}
        entries = self._entries
        return (
            *(f"name {name!r}" for name in entries.unknown_names(fqns)),
            *(f"regex {regex!r}" for regex in entries.regexes if not matches(regex, fqns)),
            *(f"type {kind!r}" for kind in entries.types if kind not in types),
        )

    def _lookup(self, site: WeightSite) -> tuple[SparsityConfig | None, str]:
        if (found := self._entries.select(site.names, _types(site))) is not None:
            return found.value, f"excluded by {found.entry}"
        if callable(self._rest):
            return self._rest(site), "excluded by the rule"
        return self._rest, "no entry of the mapping speaks of it"

    def _check_names(self, weights: WeightMap) -> None:
        fqns = [fqn for site in weights.sites for fqn in site.names]
        for name in self._entries.unknown_names(fqns):
            reasons = {parameter.fqn: parameter.reason for parameter in weights.dense}
            if name in reasons:
                raise MappingError(f"{name!r} is not a weight that can be masked: {reasons[name]}")
            near = get_close_matches(name, sorted(names_of(fqns)), n=3)
            hint = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
            raise MappingError(f"the model has no weight or owning module {name!r}{hint}")


MappingLike = SparsityMapping | SparsityConfig | str | Mapping[str, Any]
"""What `SparsityMapping.of` takes."""


def _check_pattern(pattern: Pattern, site: WeightSite) -> None:
    """Raise `PatternError` unless a weight can take a pattern, in the order in which it is used."""
    tiling = pattern.tiling(site.shape, site.roles)
    if not isinstance(pattern, NM | Block):
        return  # made of single elements, of whole slices, or of blocks as they are stored
    for use in site.uses:
        for dim in use.reordered:
            if tiling.extents[dim] > 1:
                raise PatternError(
                    f"pattern {pattern} joins neighbours along dimension {dim}, which {use.op} "
                    "does not see in the order of storage; exclude the weight, or choose an "
                    "unstructured pattern, or whole rows or channels"
                )


def _types(site: WeightSite) -> tuple[str, str]:
    """A class says more than a kind."""
    return site.owner_type, site.kind


def _text(config: SparsityConfig | None) -> str | None:
    return None if config is None else str(config)


def _parse(config: Config) -> SparsityConfig | None:
    return None if config is None else SparsityConfig.parse(config)
