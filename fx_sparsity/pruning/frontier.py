"""One option for each weight: the least sum of effects that every cost allows, by a multiplier."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from fx_sparsity.pruning.allocation.hull import lower_hull


class Option(NamedTuple):
    """What can become of one weight.

    Attributes:
        effect: on the output of the model, >= 0; 0 of a weight that stays as it is.
        cost: what it then takes, >= 0, in any unit.
    """

    effect: float
    cost: float


Choice = dict[str, int]
"""Name of a weight -> place among its options."""


class _Step(NamedTuple):
    """From one option on the hull of a weight to the next, which costs less.

    Attributes:
        slope: what it adds to the effect, for each unit of cost that it saves.
        name: of the weight.
        place: of the option that it leads to.
    """

    slope: float
    name: str
    place: int


class Frontier:
    """The options of all weights, and which of them are the best together.

    A multiplier is the price of one unit of cost: what minimizes effect + multiplier * cost does so
    for each weight alone, and is the least effect of all choices that cost as much (Everett,
    "Generalized Lagrange multiplier method", Operations Research 11, 1963). These are the choices
    along the lower convex hulls of the weights, in the order of their slopes.

    Args:
        options: by weight; the first is the weight as it is.
    """

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        self._options = options
        self._steps = sorted(step for name in options for step in self._steps_of(name))

    def _steps_of(self, name: str) -> list[_Step]:
        options = self._options[name]
        places: dict[float, int] = {}
        for place, option in enumerate(options):
            saved = options[0].cost - option.cost
            if place == 0 or saved > 0:
                best = places.setdefault(saved, place)
                places[saved] = min(best, place, key=lambda i: options[i].effect)
        hull = lower_hull({saved: options[place].effect for saved, place in places.items()})
        return [_Step((y - y0) / (x - x0), name, places[x]) for (x0, y0), (x, y) in pairwise(hull)]

    @property
    def multipliers(self) -> list[float]:
        """Where the best choice changes, in ascending order."""
        return [step.slope for step in self._steps]

    @property
    def bounds(self) -> tuple[float, float]:
        """The least cost that there is, and that of the weights as they are."""
        return self.cost(self.at(float("inf"))), self.cost(dict.fromkeys(self._options, 0))

    def cost(self, choice: Choice) -> float:
        """Sum over the weights."""
        return sum(self._options[name][place].cost for name, place in choice.items())

    def effect(self, choice: Choice) -> float:
        """Sum over the weights."""
        return sum(self._options[name][place].effect for name, place in choice.items())

    def at(self, multiplier: float) -> Choice:
        """What minimizes effect + multiplier * cost; of several, the one that costs least."""
        choice = dict.fromkeys(self._options, 0)
        for step in self._steps:
            if step.slope <= multiplier:
                choice[step.name] = step.place
        return choice

    def within(self, cost: float) -> Choice:
        """The least effect found that costs at most so much.

        Optimal where a choice on the hulls costs exactly that. Elsewhere the hull is left in one
        step, that which adds least, and what is to spare afterwards is given back.

        Raises:
            ValueError: the least cost that there is, is higher.
        """
        choice, left = dict.fromkeys(self._options, 0), self.bounds[1] - cost
        for step in self._steps:
            if left <= 0:
                break
            saved = self._saved(choice, step.name, step.place)
            if saved >= left:  # the last one, of which others may do
                self._take(choice, self._moves(choice, left))
                left = 0
                break
            choice[step.name] = step.place
            left -= saved
        if left > 0:
            raise ValueError(f"the least cost is {self.bounds[0]:g}, asked for is {cost:g}")
        while moves := self._moves(choice, self.cost(choice) - cost, gain=True):
            self._take(choice, moves)
        return choice

    def _saved(self, choice: Choice, name: str, place: int) -> float:
        return self._options[name][choice[name]].cost - self._options[name][place].cost

    def _moves(self, choice: Choice, least: float, gain: bool = False) -> list[_Step]:
        """Changes of one weight that save at least so much; `gain` asks for a lower effect, too."""
        moves = []
        for name, options in self._options.items():
            effect = options[choice[name]].effect
            for place, option in enumerate(options):
                fits = self._saved(choice, name, place) >= least
                if fits and place != choice[name] and (not gain or option.effect < effect):
                    moves.append(_Step(option.effect - effect, name, place))
        return moves

    def _take(self, choice: Choice, moves: Sequence[_Step]) -> None:
        """The change that adds least."""
        best = min(moves)
        choice[best.name] = best.place
