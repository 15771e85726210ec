"""Each cell does what `matrix.txt` says; the tables of docs/quantization.md are made from it."""

from itertools import product

import pytest

from tests.quantization.matrix import (
    DTYPES,
    LAYERS,
    ORDERS,
    PAGE,
    PATTERNS,
    SCHEMES,
    Cell,
    cells,
    on_page,
    outcome,
    read_listing,
    tables,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
]
LISTED = read_listing()


def kind(result):
    """What it comes to; torch's and torchao's own words change with their versions."""
    return result.split(": ")[:2]


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_cell(cell):
    assert kind(outcome(cell)) == kind(LISTED[cell])


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", ORDERS)
def test_every_cell(scheme, order):
    for layer, pattern, dtype in product(LAYERS, PATTERNS, DTYPES):
        cell = Cell(layer, scheme, order, pattern, dtype)
        assert kind(outcome(cell))[0] in ("quantized", "left in float", "refused"), cell


def test_nothing_is_listed_that_is_not_run():
    assert set(LISTED) == set(cells())


def test_the_page_says_what_the_listing_says():
    assert PAGE.read_text() == on_page(tables(LISTED))
