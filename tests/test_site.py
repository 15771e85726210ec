"""The site builds without a warning, holds every page and every public name; the README stays short."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fx_sparsity as fxs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
NAV = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the site was built; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_page_asks_another_server_for_anything(site):
    loaded = r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    for page in site.rglob("*.html"):
        assert re.findall(loaded, page.read_text()) == [], page


@pytest.mark.parametrize(
    "room",
    [
        *("fx_sparsity.masks", "fx_sparsity.sparsifier", "fx_sparsity.graph"),
        *("fx_sparsity.verification", "fx_sparsity.quantization", "fx_sparsity.pruning"),
        *(
            "fx_sparsity.pruning.methods",
            "fx_sparsity.pruning.allocation",
            "fx_sparsity.training",
            "fx_sparsity.kernels",
        ),
        *("fx_sparsity.lowering", "fx_sparsity.passes"),
        *("fx_sparsity.storage", "fx_sparsity.checkpoints"),
        "fx_sparsity.reporting",
    ],
)
def test_every_public_name_of_a_room_is_described(site, room):
    page = (site / "api" / f"{room.rpartition('.')[2]}.html").read_text()
    described = set(re.findall(rf'id="{re.escape(room)}\.(?:\w+\.)*(\w+)"', page))
    assert set(importlib.import_module(room).__all__) <= described


def test_every_page_is_in_the_navigation_once():
    assert sorted(NAV) == PAGES


def test_the_first_page_of_the_api_lists_the_front_names():
    listed = re.findall(r"^\| \[`(\w+)`\]", (DOCS / "api" / "index.md").read_text(), re.M)
    assert sorted(listed) == fxs.__all__


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_every_local_link_of_the_readme_leads_somewhere(target):
    assert (ROOT / target).exists()
