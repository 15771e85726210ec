"""Entries that speak of weights by name, expression or type: the most specific one wins."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")
Kind = str | type
"""A class, or what something is called."""


class Selected(NamedTuple, Generic[Value]):
    """The entry that speaks of a weight.

    Attributes:
        value: what it says.
        entry: in words, such as `name 'mlp.0'`.
        by_name: whether it names the weight, or the module that owns it.
    """

    value: Value
    entry: str
    by_name: bool


@dataclass(frozen=True)
class Selector(Generic[Value]):
    """Says of weights what their entry says.

    From the most to the least specific: the FQN of a weight; that of the module that owns it; the
    first regular expression that matches one of these from its start, as `re.match` does; a type.

    Attributes:
        names: FQN of a weight or a module -> value.
        regexes: regular expression -> value.
        types: class, its name, or a kind -> value.
    """

    names: dict[str, Value] = field(default_factory=dict)
    regexes: dict[str, Value] = field(default_factory=dict)
    types: dict[Kind, Value] = field(default_factory=dict)

    def select(self, fqns: Sequence[str], types: Iterable[Kind] = ()) -> Selected[Value] | None:
        """The entry that speaks of a weight; None where none does.

        Args:
            fqns: every name of the weight.
            types: what it may be called by, the most specific first.
        """
        for name in (*fqns, *map(_owner, fqns)):
            if name in self.names:
                return Selected(self.names[name], f"name {name!r}", True)
        for regex, value in self.regexes.items():
            if matches(regex, fqns):
                return Selected(value, f"regex {regex!r}", False)
        for kind in types:
            if kind in self.types:
                return Selected(self.types[kind], f"type {type_name(kind)!r}", False)
        return None

    def unknown_names(self, fqns: Iterable[str]) -> Iterator[str]:
        """Names that neither a weight has, of those that `fqns` lists, nor an owner of one."""
        known = names_of(fqns)
        yield from (name for name in self.names if name not in known)


def names_of(fqns: Iterable[str]) -> set[str]:
    """What weights may be called by: their FQNs, and those of the modules that own them."""
    fqns = list(fqns)
    return {*fqns, *map(_owner, fqns)}


def matches(regex: str, fqns: Iterable[str]) -> bool:
    """Whether an expression matches a weight, or the module that owns it, from the name's start."""
    return any(re.match(regex, name) for fqn in fqns for name in (fqn, _owner(fqn)))


def type_name(kind: Kind) -> str:
    """A class by its name in full; a kind as it is."""
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind


def _owner(fqn: str) -> str:
    return fqn.rpartition(".")[0]
