"""A report is one well-formed file that asks for nothing, escapes everything, and says what the parts say."""

import doctest
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.graph import Assignment, WeightMap
from fx_sparsity.masks.bits import pack_bits
from fx_sparsity.pruning import Budget, Evaluation, search, sensitivity
from fx_sparsity.reporting import Bytes, Facts, densities, facts, write_html
from fx_sparsity.sparsifier import MaskRecord, SparsityRecord

EVIL = '<script>alert("&")</script>'
CHROMIUM = Path("/usr/bin/chromium")
VOID = {"meta", "img", "br", "wbr", "input", "path", "polyline", "circle"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps tables as texts and attributes of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.tables = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", dict(attrs)])

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1][0] += data

    def column(self, title):
        """First column -> text and attributes of the cell, in the first table that has the title."""
        for header, *rows in self.tables:
            titles = [text for text, _ in header]
            if title in titles:
                return {row[0][0]: row[titles.index(title)] for row in rows}
        raise KeyError(title)


class Nasty(nn.Module):
    """Its modules have names with markup."""

    def __init__(self):
        super().__init__()
        for name, size in {EVIL: 32, "b": 32, "c": 32, "head": 4}.items():
            self.add_module(name, nn.Linear(32, size))

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


@pytest.fixture(scope="module")
def parts():
    """What the verbs return, by name."""
    torch.manual_seed(0)
    model, batches = Nasty().eval(), [(torch.randn(16, 32),) for _ in range(4)]
    mapping = fxs.SparsityMapping().set_global("unstructured 50%").set_module_name("b", "2:4")
    mapping.set_module_name("head", None)
    found = {"weights": fxs.find_weights(model, batches[0])}
    found["assignment"] = mapping.resolve(found["weights"])
    method = fxs.WandaSparsifier()
    found["sensitivity"] = sensitivity(model, method, batches, candidates=["2:4"], progress=False)
    score = Evaluation(lambda m: float(m(*batches[0]).square().mean()), better="lower", name="loss")
    budget = Budget(bytes=0.8 * found["sensitivity"].bytes)
    found["plan"] = search(
        *(model, method, batches, score, budget),
        sensitivity=found["sensitivity"],
        evaluations=3,
        progress=False,
    )
    method = fxs.SparseGPTSparsifier()
    model, found["pruned"] = fxs.prune(model, method, batches, mapping, progress=False)
    model, found["record"] = fxs.squash(model, method)
    found["verification"] = fxs.verify(model, found["record"])
    found["densities"] = densities(model)
    model, found["lowered"] = fxs.lower(model, batches[0], policy="always", record=found["record"])
    return found


KINDS = (
    *("weights", "assignment", "sensitivity", "plan", "pruned", "record", "verification"),
    *("densities", "lowered"),
)


def written(tmp_path, *parts, **options):
    return Page(write_html(tmp_path / "report.html", *parts, **options).read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_verb_returns_makes_a_page(parts, kind, tmp_path):
    page = written(tmp_path, parts[kind])
    assert EVIL in "".join(page.texts)
    assert page.tables


def test_all_together_ask_for_nothing_and_run_nothing_of_theirs(parts, tmp_path):
    path = write_html(
        tmp_path / "report.html",
        *(parts[kind] for kind in KINDS),
        title=EVIL,
        headline={EVIL: (EVIL, 0.5), "mine": (Bytes(2_000_000), Bytes(500_000))},
        reproduce=EVIL,
    )
    text = path.read_text()
    page = Page(text)
    assert text.count("<script>") == page.tags.count("script") == 1
    assert "alert(&" in text
    targets = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert targets
    assert all(value.startswith("data:image/png;base64,") for value in targets)
    assert not re.search(r"https?:|@import|url\(", text)
    assert {"500 kB", "before: 2 MB (-75%)"} <= set(page.texts)


def test_the_figures_are_those_of_the_parts(parts, tmp_path):
    page = written(tmp_path, *(parts[k] for k in ("weights", "pruned", "verification", "lowered")))
    rows = {row["fqn"]: row for row in parts["pruned"].to_dict()["rows"]}
    errors = page.column("error")
    for fqn, row in rows.items():
        text, attributes = errors[fqn]
        assert float(attributes["data-sort"]) == pytest.approx(row["error"], rel=1e-8)
        assert float(text) == pytest.approx(row["error"], rel=5e-3)
    assert page.column("pattern")["b.weight"][0] == "2:4"
    assert page.column("pattern")["c.weight"][0] == "unstructured 50%"
    for fqn, (_, attributes) in page.column("bytes after").items():
        assert int(attributes["data-sort"]) == parts["lowered"][fqn].bytes_after
    zeros = {row.fqn: row.sparsity for row in parts["verification"]}
    for fqn, (_, attributes) in page.column("sparsity").items():
        assert float(attributes.get("data-sort", -1)) == zeros.get(fqn, -1)
    assert {text for text, _ in page.column("verdict").values()} == {"ok", "-"}
    assert page.column("which")["excluded by name 'head'"][0] == "head.weight"


def test_columns_that_say_nothing_are_left_out(parts, tmp_path):
    page = written(tmp_path, parts["plan"], parts["sensitivity"])
    titles = [{text for text, _ in header} for header, *_ in page.tables]
    assert {"ms"} & set(parts["sensitivity"].tables[0].header)
    assert not any({"ms"} & found for found in titles)


def test_titles_of_the_layers_are_buttons_that_sort(parts, tmp_path):
    page = written(tmp_path, parts["pruned"])
    header, *rows = page.tables[0]
    assert {attributes["aria-sort"] for _, attributes in header} == {"none"}
    assert page.tags.count("button") >= len(header)
    assert {attributes["scope"] for _, attributes in header} == {"col"}


def test_the_first_part_counts(parts, tmp_path):
    own = Facts(headline={"gate": "mine"}, columns={"pattern": {"b.weight": "mine"}})
    page = written(tmp_path, own, parts["verification"], headline={"zeros in masked weights": 7})
    assert page.column("pattern")["b.weight"][0] == "mine"
    assert {"mine", "7"} <= set(page.texts)
    assert f"{len(parts['verification'])} of 3 ok" not in page.texts


def test_what_is_not_finite_has_no_bar(tmp_path):
    cells = {"a": float("nan"), "b": float("inf"), "c": 0.5, "d": None}
    page = written(tmp_path, Facts(columns={"x": cells}), Facts(columns={"x": {"d": 1.0}}))
    assert [text for text, _ in page.column("x").values()] == ["nan", "inf", "0.5", "1"]
    assert [v for k, v in page.attributes if "--part" in (v or "")] == ["--part:50%", "--part:100%"]


def test_a_lost_zero_is_told(parts, tmp_path):
    model = Nasty()
    page = written(tmp_path, fxs.verify(model, parts["record"]))
    assert "pattern 2:4 broken" in page.column("verdict")["b.weight"][0]
    assert "0 of 3 ok" in page.texts


def test_a_thousand_weights_stay_below_two_megabytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    none = torch.empty(0, dtype=torch.uint8)
    record = SparsityRecord(
        {
            f"model.layers.{i}.mlp.down_proj.weight": MaskRecord(
                *((96, 96), ("out", "in"), "unstructured", 0.5),
                *(pack_bits(torch.rand(96, 96, generator=generator) < 0.5), none),
            )
            for i in range(1000)
        }
    )
    path = write_html(tmp_path / "large.html", record, Assignment({}, dict.fromkeys(record, "why")))
    assert path.stat().st_size < 2_000_000
    assert len(Page(path.read_text()).column("sparsity")) == 1000


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"nn": nn, "fxs": fxs, "write_html": write_html}
    (found,) = doctest.DocTestFinder(recurse=False).find(write_html, "write_html", globs=names)
    assert doctest.DocTestRunner().run(found) == (0, 2)
    assert (tmp_path / "report.html").exists()


def test_what_cannot_be_reported():
    with pytest.raises(ValueError, match="found nothing to report"):
        write_html("never.html")
    with pytest.raises(ValueError, match=r"headline: loss: expected \(before, after\)"):
        write_html("never.html", WeightMap(()), headline={"loss": (1, 2, 3)})
    with pytest.raises(TypeError, match="found Linear"):
        facts(nn.Linear(1, 1))


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"record", "densities"}))
def test_notebooks_show_tables(parts, kind):
    part = parts[kind]
    page = Page(part._repr_html_())
    assert "script" not in page.tags
    assert part.summary in page.texts
    assert len(page.tables) == len(part.tables)
    for shown, table in zip(page.tables, part.tables, strict=True):
        assert [text for text, _ in shown[0]] == list(table.header)
        assert len(shown) == 1 + len(table.rows)
    assert not re.search(r"https?:", part._repr_html_())


if CHROMIUM.exists():  # which is no part of the tests' environment

    @pytest.mark.exhaustive
    def test_a_click_sorts_and_the_filter_hides(parts, tmp_path):
        path = write_html(tmp_path / "report.html", parts["pruned"])
        script = """<script>
        const titles = [...document.querySelectorAll("th button")];
        const button = titles.find((b) => b.textContent === "error");
        const table = button.closest("table");
        const column = button.parentElement.cellIndex;
        const values = () => [...table.tBodies[0].rows].map((r) => r.cells[column].dataset.sort);
        const found = [];
        for (const _ of [0, 1]) { button.click(); found.push([button.parentElement.ariaSort, values()]); }
        const filter = document.querySelector(".filter");
        filter.value = "C.WEI"; filter.dispatchEvent(new Event("input"));
        found.push([...table.tBodies[0].rows].map((r) => r.hidden));
        document.body.append(Object.assign(document.createElement("pre"),
          { id: "found", textContent: JSON.stringify(found) }));
        </script></body>"""
        path.write_text(path.read_text().replace("</body>", script))
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        folder = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [*command, folder, "--dump-dom", path.as_uri()],
            capture_output=True,
            text=True,
            check=True,
        )
        (up, ups), (down, downs), hidden = json.loads(
            re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]
        )
        assert (up, down) == ("ascending", "descending")
        assert [*map(float, ups)] == sorted(map(float, ups)) == [*map(float, downs)][::-1]
        assert sorted(hidden) == [False, True, True]
