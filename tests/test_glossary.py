"""The glossary is one page whose places exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
PLACES = sorted(set(re.findall(r"`([a-z_/]+)(?:\.(py|[A-Z]\w+)|/)`", GLOSSARY)))


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_every_place_exists(path, name):
    place = ROOT / "fx_sparsity" / (f"{path}.py" if name else path)
    assert place.exists()
    if name not in ("", "py"):
        assert re.search(rf"^(class )?{name}\b", place.read_text(), re.M)


def test_no_term_has_two_entries():
    terms = [
        term
        for line in re.findall(r"^- (\*\*.*?):", GLOSSARY, re.M)
        for term in re.findall(r"\*\*(.+?)\*\*", line)
    ]
    assert len(terms) > 60
    assert len(terms) == len(set(terms))
