"""Every cell of layers x backends x orders x patterns x dtypes: does it work, or why is it refused?

    python -m tests.quantization.matrix --write

runs the cells of the tables of docs/quantization.md and a pairwise covering of all the axes, and
writes `matrix.txt` and those tables.
"""

import argparse
import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from itertools import combinations, product
from pathlib import Path

import torch
import torchao.quantization as tqo
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fx_sparsity as fxs
from fx_sparsity.graph import MappingError
from fx_sparsity.quantization import BackendError, sparsify_and_quantize
from fx_sparsity.sparsifier import MaskError
from fx_sparsity.verification import ZeroNotRepresentableError

HERE = Path(__file__).parent
LISTING = HERE / "matrix.txt"
PAGE = HERE.parents[1] / "docs" / "quantization.md"


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        return F.linear(x, self.weight)


class ConvNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index):
        return self.head(self.embed(index))


class Doubled(nn.Linear):
    """A user's subclass, with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 32, 32))

    def forward(self, x):
        return torch.bmm(x, self.weight)


class Embedded(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, index):
        return self.table(index)


def _vectors():
    return (torch.randn(4, 32),)


def _indices():
    return (torch.randint(40, (3, 5)),)


def _images():
    return (torch.randn(2, 4, 8, 8),)


_IN_FLOAT, _IN_PART = "left in float", "quantized in part"
_MARKS = {_IN_FLOAT: "in float", _IN_PART: "in part", "refused": "**no**"}

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "Linear": (lambda: nn.Sequential(nn.Linear(32, 32)), _vectors),
    "functional linear": (Functional, _vectors),
    "linear-relu": (lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU()), _vectors),
    "Embedding": (lambda: Embedded(nn.Embedding(40, 32)), _indices),
    "EmbeddingBag": (lambda: Embedded(nn.EmbeddingBag(40, 32, mode="mean")), _indices),
    "Conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), _images),
    "conv-bn-relu": (ConvNorm, _images),
    "tied head": (Tied, _indices),
    "parametrized subclass": (
        lambda: nn.Sequential(parametrizations.weight_norm(Doubled(32, 32))),
        _vectors,
    ),
    "3-D experts": (Experts, lambda: (torch.randn(2, 4, 32),)),
}
"""Name -> model, and its inputs in float32."""


def _eager(dynamic):
    from fx_sparsity.quantization.torch_ao.eager import default_qconfigs

    return lambda qat: default_qconfigs(dynamic=dynamic, qat=qat)


def _fx(dynamic):
    from fx_sparsity.quantization.torch_ao.fx import default_qconfig_mapping

    return lambda qat: default_qconfig_mapping(dynamic=dynamic, qat=qat)


def _pt2e(dynamic):
    from fx_sparsity.quantization.pt2e import default_quantizer

    return lambda qat: default_quantizer(dynamic=dynamic, qat=qat)


def _torchao(linear):
    from fx_sparsity.quantization.torchao_backend import DEFAULT_CONFIGS

    return lambda qat: {**DEFAULT_CONFIGS, nn.Linear: linear}


SCHEMES: dict[str, tuple[str, Callable[[bool], object]]] = {
    "eager dynamic": ("eager", _eager(True)),
    "eager static": ("eager", _eager(False)),
    "fx dynamic": ("fx", _fx(True)),
    "fx static": ("fx", _fx(False)),
    "pt2e dynamic": ("pt2e", _pt2e(True)),
    "pt2e static": ("pt2e", _pt2e(False)),
    "torchao int8 weight-only": ("torchao", _torchao(tqo.Int8WeightOnlyConfig())),
    "torchao int8 dynamic": ("torchao", _torchao(tqo.Int8DynamicActivationInt8WeightConfig())),
    "torchao int4 groups": (
        "torchao",
        _torchao(tqo.IntxWeightOnlyConfig(torch.int4, tqo.PerGroup(32))),
    ),
    "torchao int4 groups, asymmetric": (
        "torchao",
        _torchao(
            tqo.IntxWeightOnlyConfig(
                torch.int4, tqo.PerGroup(32), mapping_type=tqo.MappingType.ASYMMETRIC
            )
        ),
    ),
    "torchao float8 weight-only": ("torchao", _torchao(tqo.Float8WeightOnlyConfig())),
    "torchao int4 tiles": (
        "torchao",
        _torchao(tqo.Int4WeightOnlyConfig(32, int4_packing_format="tile_packed_to_4d")),
    ),
}
"""Name -> backend, and its configuration (for training, or not)."""
ORDERS = ("sparsify_first", "quantize_first", "interleaved", "qat")
PATTERNS = ("unstructured 50%", "2:4", "block:2x4 50%", "rows 50%")
DTYPES = ("float32", "bfloat16")
AXES = (tuple(LAYERS), tuple(SCHEMES), ORDERS, PATTERNS, DTYPES)


@dataclass(frozen=True)
class Cell:
    layer: str
    scheme: str
    order: str
    pattern: str
    dtype: str

    def __str__(self) -> str:
        return " | ".join(astuple(self))


def outcome(cell: Cell) -> str:
    """`quantized` or `left in float` and why, the zeros proved; or the refusal, in words.

    Raises:
        SparsityLostError: zeros were lost, which no cell may do.
        Exception: anything that is not a typed refusal.
    """
    torch.manual_seed(0)
    build, make_inputs = LAYERS[cell.layer]
    dtype = getattr(torch, cell.dtype)
    model = build().eval().to(dtype)
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in make_inputs())
    backend, config = SCHEMES[cell.scheme]
    sparsifier = fxs.WeightNormSparsifier()
    before = copy.deepcopy(model.state_dict())

    def train(prepared: nn.Module) -> None:
        optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            prepared(*inputs).float().pow(2).mean().backward()
            optimizer.step()
            sparsifier.step()

    try:
        _, verification = sparsify_and_quantize(
            model,
            sparsifier,
            inputs,
            order=cell.order,
            backend=backend,
            mapping=fxs.SparsityMapping().set_global(cell.pattern),
            calibrate=train if cell.order == "qat" else None,
            config=config(cell.order == "qat"),
        )
    except (BackendError, ZeroNotRepresentableError, MaskError, MappingError) as refusal:
        return f"refused: {type(refusal).__name__}: {_first_line(refusal)}"
    finally:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} of the user's model has changed"
    verification.raise_if_lost()
    assert len(verification) > 0
    assert verification.share == 1
    assert all(row.wanted for row in verification)
    left = [row for row in verification if not row.quantized]
    assert all(row.in_float for row in left)
    if not left:
        return "quantized"
    reasons = " and ".join(dict.fromkeys(row.in_float for row in left))
    return f"{_IN_FLOAT if len(left) == len(verification) else _IN_PART}: {reasons}"


def _first_line(error: Exception) -> str:
    """Without what follows the reason: the advice, and long representations."""
    line = re.sub(r"\s+", " ", str(error).splitlines()[0])
    return re.split(r"; (?:exclude|call|use)|\(group|\(act|\(weight", line)[0]


def claimed() -> Iterator[Cell]:
    """The cells of the tables of docs/quantization.md."""
    for layer, scheme in product(LAYERS, SCHEMES):
        yield Cell(layer, scheme, "sparsify_first", "2:4", "float32")
    for scheme, order in product(SCHEMES, ORDERS[1:]):
        yield Cell("Linear", scheme, order, "2:4", "float32")
    for scheme in SCHEMES:
        yield Cell("Linear", scheme, "sparsify_first", "2:4", "bfloat16")


def pairwise(chosen: list[Cell]) -> list[Cell]:
    """Further cells, so that every pair of values of two axes occurs in one; chosen greedily."""
    places = list(combinations(range(len(AXES)), 2))

    def pairs(values: tuple[str, ...]) -> set[tuple[int, int, str, str]]:
        return {(i, j, values[i], values[j]) for i, j in places}

    missing = {p for i, j in places for p in ((i, j, a, b) for a, b in product(AXES[i], AXES[j]))}
    for cell in chosen:
        missing -= pairs(astuple(cell))
    every = list(product(*AXES))
    added = []
    while missing:
        best = max(every, key=lambda values: len(pairs(values) & missing))
        missing -= pairs(best)
        added.append(Cell(*best))
    return added


def cells() -> list[Cell]:
    """All that is run."""
    chosen = list(claimed())
    return chosen + pairwise(chosen)


def read_listing() -> dict[Cell, str]:
    """What `matrix.txt` says of each cell."""
    listed = {}
    for line in LISTING.read_text().splitlines():
        if line and not line.startswith("#"):
            *values, result = line.split(" | ", maxsplit=len(fields(Cell)))
            listed[Cell(*values)] = result
    return listed


def tables(results: dict[Cell, str]) -> str:
    """The page's tables, in Markdown, with a list of reasons for what is refused."""
    reasons: dict[str, int] = {}

    def mark(result: str) -> str:
        if result == "quantized":
            return "yes"
        done, _, reason = result.partition(": ")
        reason = re.sub(r"^BackendError: (\S+\.weight: )?", "", reason)
        note = reasons.setdefault(reason, len(reasons) + 1)
        return f"{_MARKS[done]}&nbsp;[{note}]"

    layers = ["| sparsify first, 2:4 | " + " | ".join(LAYERS) + " |"]
    layers.append("| --- " * (len(LAYERS) + 1) + "|")
    for scheme in SCHEMES:
        row = [
            mark(results[Cell(layer, scheme, "sparsify_first", "2:4", "float32")])
            for layer in LAYERS
        ]
        layers.append(f"| {scheme} | " + " | ".join(row) + " |")
    heads = [order.replace("_", " ") for order in ORDERS] + ["bfloat16"]
    orders = ["| a Linear, 2:4 | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for scheme in SCHEMES:
        row = [mark(results[Cell("Linear", scheme, o, "2:4", "float32")]) for o in ORDERS]
        row.append(mark(results[Cell("Linear", scheme, "sparsify_first", "2:4", "bfloat16")]))
        orders.append(f"| {scheme} | " + " | ".join(row) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*layers, "", *orders, "", *notes])


def on_page(text: str) -> str:
    """The page with these tables between its markers."""
    start, end = "<!-- matrix -->\n", "\n<!-- end of matrix -->"
    head, _, rest = PAGE.read_text().partition(start)
    return head + start + text + end + rest.partition(end)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write matrix.txt and the page")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = {}
    for cell in cells():
        results[cell] = outcome(cell)
        print(f"{cell} | {results[cell]}", flush=True)
    if arguments.write:
        header = "# Made by: python -m tests.quantization.matrix --write\n"
        LISTING.write_text(header + "".join(f"{c} | {r}\n" for c, r in results.items()))
        PAGE.write_text(on_page(tables(results)))


if __name__ == "__main__":
    main()
