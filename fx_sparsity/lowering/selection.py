"""What the graphs of one compiled module have shown so far, so that all of them decide as one."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fx_sparsity.graph import SparsityMapping, WeightMap, WeightSite
from fx_sparsity.graph.uses import canonical_fqn


class Selection:
    """The weights of a compiled module, or function, as the first graph showed them that uses them.

    Graph breaks may leave the uses of one weight in several graphs, and its first use says what it
    is: a table whose rows are looked up in one graph stays an embedding where another multiplies
    with it.
    """

    def __init__(self) -> None:
        self._seen = WeakTensorKeyDictionary()  # input of a graph -> its site; None if it has none

    @staticmethod
    def of(owner: object) -> "Selection":
        """The one of a module or function; a new one for whatever else has been compiled."""
        if isinstance(owner, nn.Module | FunctionType):
            return _SELECTIONS.setdefault(owner, Selection())
        return Selection()

    def take_in(self, weights: WeightMap, tensors: Mapping[str, Tensor]) -> WeightMap:
        """Remember what a graph shows.

        Args:
            weights: of the graph.
            tensors: that it reads, by name.

        Returns:
            The same weights, each as the first graph showed it, by all the names that it had.
        """
        sites = []
        for site in weights.sites:
            first: WeightSite = self._seen.get(tensors[site.fqn]) or site
            names = dict.fromkeys((site.fqn, *site.names, *first.names))
            first = replace(first, fqn=site.fqn, aliases=tuple(names)[1:], owner=site.owner)
            self._seen[tensors[site.fqn]] = first
            sites.append(first)
        for tensor in tensors.values():
            self._seen.setdefault(tensor, None)
        return replace(weights, sites=tuple(sites))

    def notes(self, mapping: SparsityMapping | None, model: nn.Module | None) -> Iterator[str]:
        """What a user should know who takes every weight of the model for sparse.

        Args:
            mapping: None where nothing is pruned.
            model: that was compiled; None where it is not known.
        """
        if mapping is not None:
            sites = tuple(site for site in self._seen.values() if site is not None)
            if unmatched := mapping.unmatched(WeightMap(sites)):
                yield f"no weight of any graph so far matches {', '.join(unmatched)}"
        if model is not None:
            unread = [
                canonical_fqn(name)
                for name, parameter in model.named_parameters()
                if parameter.ndim >= 2 and parameter not in self._seen
            ]
            if unread:
                yield f"in no graph so far, and dense where they are used: {', '.join(unread)}"


_SELECTIONS: "WeakKeyDictionary[nn.Module | FunctionType, Selection]" = WeakKeyDictionary()
"""What `torch.compile` was given -> its selection, for as long as it lives."""
