"""Each cell does what `matrix.txt` says; the README's tables are made from it."""

import pytest

from tests.quantization.matrix import README, cells, in_readme, outcome, read_listing, tables

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
]
LISTED = read_listing()


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_cell(cell):
    assert outcome(cell) == LISTED[cell]


def test_nothing_is_listed_that_is_not_run():
    assert set(LISTED) == set(cells())


def test_the_readme_says_what_the_listing_says():
    assert README.read_text() == in_readme(tables(LISTED))
