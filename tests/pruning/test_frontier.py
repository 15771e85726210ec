"""The best option of each weight, against all choices that there are."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_sparsity.pruning.frontier import Frontier, Option

WHOLE = st.integers(0, 12)
TABLES = st.lists(
    st.lists(st.tuples(WHOLE, WHOLE), max_size=4).map(
        lambda found: [Option(0, 10), *(Option(*pair) for pair in found)]
    ),
    min_size=1,
    max_size=4,
).map(lambda found: {f"w{n}": options for n, options in enumerate(found)})


def all_choices(table):
    """(effect, cost) of every choice."""
    for options in itertools.product(*table.values()):
        yield sum(o.effect for o in options), sum(o.cost for o in options)


def least(table, cost):
    """The least effect that a cost allows; infinite where none does."""
    return min((e for e, c in all_choices(table) if c <= cost), default=math.inf)


@given(TABLES, st.fractions(0, 12))
def test_a_multiplier_minimizes_the_sum_of_both(table, multiplier):
    frontier = Frontier(table)
    choice = frontier.at(multiplier)
    found = frontier.effect(choice) + multiplier * frontier.cost(choice)
    assert math.isclose(found, min(e + multiplier * c for e, c in all_choices(table)))


@given(TABLES)
def test_a_choice_on_the_hulls_is_optimal_at_its_cost(table):
    frontier = Frontier(table)
    for multiplier in (-1, *frontier.multipliers):
        choice = frontier.at(multiplier)
        cost, best = frontier.cost(choice), least(table, frontier.cost(choice))
        assert frontier.effect(choice) == best
        found = frontier.within(cost)
        assert frontier.effect(found) == best
        assert frontier.cost(found) <= cost


@given(TABLES, st.integers(0, 45))
@settings(max_examples=300)
def test_any_cost_is_kept_and_the_effect_is_near_the_least(table, cost):
    frontier = Frontier(table)
    best = least(table, cost)
    if best == math.inf:
        with pytest.raises(ValueError, match=f"asked for is {cost}"):
            frontier.within(cost)
        return
    found = frontier.within(cost)
    assert frontier.cost(found) <= cost
    assert best <= frontier.effect(found)
    hulls = [frontier.at(m) for m in (-1, *frontier.multipliers)]
    fitting = [frontier.effect(choice) for choice in hulls if frontier.cost(choice) <= cost]
    assert frontier.effect(found) <= min(fitting)


def test_bounds():
    frontier = Frontier({"a": [Option(0, 4), Option(1, 2), Option(9, 3)], "b": [Option(0, 5)]})
    assert frontier.bounds == (7, 9)
    assert frontier.within(8) == {"a": 1, "b": 0}
