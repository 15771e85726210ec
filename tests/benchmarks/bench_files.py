"""Bytes of compressed files, and how long they take to save and load, next to dense ones.

    python -m tests.benchmarks.bench_files --write

Both files lie in one folder and take turns. The dense file is loaded *and* every byte of it summed,
nothing copied, since `safetensors` maps files lazily; the compressed one ends as the parameters of
a model. Cold means that the system was told to forget the file first. What is saved
is synced, file and folder.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fx_sparsity as fxs
from fx_sparsity._native import MASKS, STORAGE
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.storage import CompressedFile
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("files.txt")
COLUMNS = 4096
CELLS = [
    (torch.bfloat16, "unstructured 50%"),
    (torch.bfloat16, "unstructured 90%"),
    (torch.bfloat16, "2:4"),
    (torch.bfloat16, "block:32x32 50%"),
    (torch.bfloat16, "rows 50%"),
    (torch.float32, "unstructured 50%"),
    (torch.float32, "unstructured 90%"),
    (torch.int8, "unstructured 50%"),
    (torch.int8, "unstructured 90%"),
    (torch.bfloat16, "unstructured 0%"),
]
HEADER = (
    f"{'dtype':<10}{'pattern':<19}{'format':<10}{'bytes':>7}"
    f"{'read':>8}{'model':>7}{'ours':>7}{'/read':>7}{'/model':>7}"
    f"{'cold':>8}{'ours':>7}{'/cold':>7}{'save':>8}{'ours':>7}{'times':>7}"
)


@dataclass(frozen=True)
class Result:
    """One line: share of the dense file's bytes, and medians in milliseconds."""

    dtype: torch.dtype
    pattern: str
    forms: str
    share: float
    read: float
    dense_model: float
    model: float
    cold_dense: float
    cold: float
    save_dense: float
    save: float

    def line(self) -> str:
        return (
            f"{str(self.dtype)[6:]:<10}{self.pattern:<19}{self.forms:<10}{self.share:>7.1%}"
            f"{self.read:>8.0f}{self.dense_model:>7.0f}{self.model:>7.0f}"
            f"{self.model / self.read:>7.2f}{self.model / self.dense_model:>7.2f}"
            f"{self.cold_dense:>8.0f}{self.cold:>7.0f}{self.cold / self.cold_dense:>7.2f}"
            f"{self.save_dense:>8.0f}{self.save:>7.0f}{self.save / self.save_dense:>7.2f}"
        )


def weights(dtype: torch.dtype, pattern: str, nbytes: int) -> dict[str, Tensor]:
    """Four matrices of `nbytes` in all, masked."""
    generator = torch.Generator().manual_seed(0)
    rows = nbytes // 4 // COLUMNS // dtype.itemsize // 32 * 32
    config = SparsityConfig.parse(pattern)
    sparsifier = fxs.DataNormSparsifier()
    state = {}
    for i in range(4):
        weight = torch.randn(rows, COLUMNS, generator=generator)
        keep = sparsifier.mask_for(
            "weight", weight, pattern=config.pattern, sparsity_level=config.level
        )
        if dtype == torch.int8:
            weight = (weight * 30).round().clamp(-127, 127)
            weight[weight == 0] = 1
        state[f"w{i}"] = weight.masked_fill_(~keep, 0).to(dtype)
    return state


def read_all(state: dict[str, Tensor]) -> int:
    """Read every byte."""
    return sum(int(tensor.view(torch.int64).sum()) for tensor in state.values())


def forget(path: Path) -> None:
    """Have the system drop a file from memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def interleaved(runs: int, *works: tuple[Callable[[], object], Path | None]) -> Iterator[float]:
    """Median milliseconds of each; a path is forgotten before each run."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(runs):
        for (work, path), into in zip(works, times, strict=True):
            if path is not None:
                forget(path)
            started = time.perf_counter()
            work()
            into.append(1000 * (time.perf_counter() - started))
    return (statistics.median(each) for each in times)


def measure(dtype: torch.dtype, pattern: str, nbytes: int, runs: int, folder: Path) -> Result:
    """One cell."""
    state = weights(dtype, pattern, nbytes)
    dense, ours = folder / "dense.safetensors", folder / "ours.safetensors"

    def save_dense() -> None:
        save_file(state, dense)
        sync(dense)
        sync(folder)

    save_times = interleaved(
        min(runs, 3), (save_dense, None), (lambda: fxs.save(state, ours), None)
    )
    saved_dense, saved = save_times
    model = nn.Module()
    for name, tensor in state.items():
        model.register_buffer(name, torch.zeros_like(tensor))

    def read() -> None:
        read_all(load_file(dense))

    def dense_into_model() -> None:
        model.load_state_dict(load_file(dense))

    def into_model() -> None:
        fxs.load(ours, model)

    reading, dense_model, into = interleaved(
        runs, (read, None), (dense_into_model, None), (into_model, None)
    )
    cold_dense, cold = interleaved(min(runs, 3), (read, dense), (into_model, ours))
    assert all(torch.equal(getattr(model, name), tensor) for name, tensor in state.items())
    share = ours.stat().st_size / dense.stat().st_size
    forms = "/".join(sorted(set(CompressedFile(ours).forms.values())))
    return Result(
        dtype,
        pattern,
        forms,
        share,
        reading,
        dense_model,
        into,
        cold_dense,
        cold,
        saved_dense,
        saved,
    )


def main(arguments: list[str] | None = None) -> list[Result]:
    """Print the table; `--write` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    MASKS.ready()
    lines = [
        f"{options.megabytes} MiB in four matrices; {machine(STORAGE)}",
        "read: dense file loaded and every byte summed; model: dense file into a model; "
        "ours: compressed file into the same model",
        "cold: the same as read and ours; save: synced",
        "",
        HEADER,
    ]
    print("\n".join(lines), flush=True)
    results = []
    folder = Path(tempfile.mkdtemp())
    try:
        for dtype, pattern in CELLS:
            result = measure(dtype, pattern, options.megabytes << 20, options.runs, folder)
            results.append(result)
            lines.append(result.line())
            print(lines[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")
    return results


if __name__ == "__main__":
    main()
