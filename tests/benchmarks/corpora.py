"""Text that a Python installation carries, in domains, cut into calibration and evaluation.

Calibration and evaluation are of different documents. A paragraph that occurred before, in any
domain, is left out: 40% of `pydoc_data.topics` repeats. `digest` tells whether two runs saw the
same text; the standard library differs between versions of Python.
"""

import ast
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

_CODE = [
    "argparse",
    "ast",
    "bdb",
    "cgi",
    "cmd",
    "codecs",
    "configparser",
    "copy",
    "csv",
    "dataclasses",
    "difflib",
    "dis",
    "doctest",
    "enum",
    "fileinput",
    "fractions",
    "ftplib",
    "functools",
    "getopt",
    "gettext",
    "glob",
    "gzip",
    "heapq",
    "imaplib",
    "inspect",
    "ipaddress",
    "locale",
    "mailbox",
    "mimetypes",
    "netrc",
    "ntpath",
    "optparse",
    "pickle",
    "platform",
    "plistlib",
    "poplib",
    "pprint",
    "pydoc",
    "random",
    "sched",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "smtplib",
    "socket",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "timeit",
    "trace",
    "turtle",
    "typing",
    "uuid",
    "weakref",
    "webbrowser",
    "zipfile",
]
_EVERY = 4  # document of a domain that is for evaluation


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        name: of it.
        calibration: text to calibrate on; empty for a domain that is only evaluated.
        evaluation: of other documents.
    """

    name: str
    calibration: str
    evaluation: str


@cache
def domains() -> list[Domain]:
    """Reference pages, docstrings and source code; and a licence that is never calibrated on."""
    seen: set[str] = set()
    sources: dict[str, list[str]] = {
        "reference": [topics.topics[name] for name in sorted(topics.topics)],
        "docstrings": [_docstrings(path) for path in _modules()],
        "code": [_without_docstrings(path) for path in _modules()],
    }
    found = []
    for name, documents in sources.items():
        held = [d for i, d in enumerate(documents) if i % _EVERY == _EVERY - 1]
        used = [d for i, d in enumerate(documents) if i % _EVERY != _EVERY - 1]
        evaluation = _joined(held, seen)
        found.append(Domain(name, _joined(used, seen), evaluation))
    licence = Path(sysconfig.get_path("stdlib"), "LICENSE.txt").read_text()
    return [*found, Domain("licence", "", _joined([licence], seen))]


def digest(found: list[Domain]) -> str:
    """Of all text: twelve hexadecimal digits."""
    text = "\0".join(part for d in found for part in (d.name, d.calibration, d.evaluation))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sequences(
    text: str, encode: Callable[[str], list[int]], length: int, most: int
) -> list[Tensor]:
    """Token sequences, [1, length] each, spread over a text.

    Args:
        text: any.
        encode: text -> tokens.
        length: tokens of each.
        most: how many, at most.
    """
    tokens = torch.tensor(encode(text))
    count = len(tokens) // length
    places = range(count) if count <= most else [i * count // most for i in range(most)]
    return [tokens[place * length : (place + 1) * length].unsqueeze(0) for place in places]


def _joined(documents: list[str], seen: set[str]) -> str:
    kept = []
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def _modules() -> Iterator[Path]:
    for name in _CODE:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            yield Path(spec.origin)


def _documented(path: Path) -> Iterator[ast.Constant]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def _docstrings(path: Path) -> str:
    return "\n\n".join(str(found.value) for found in _documented(path))


def _without_docstrings(path: Path) -> str:
    lines = path.read_text().splitlines()
    for found in _documented(path):
        for line in range(found.lineno - 1, found.end_lineno or found.lineno):
            lines[line] = ""
    return "\n".join(lines)
