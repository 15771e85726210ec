"""How long `sparsify_checkpoint` takes, next to copying the files and the mask engine's own time.

    python -m tests.benchmarks.bench_checkpoint --write

Copying, the engine and ours take turns. Both outputs are synced, files and folder, and the disk has
come to rest before each turn.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import fx_sparsity as fxs
from fx_sparsity._native import MASKS, STORAGE
from fx_sparsity.patterns import SparsityConfig
from tests.benchmarks.bench_files import COLUMNS, sync
from tests.benchmarks.bench_masks import machine

TABLE = Path(__file__).with_name("checkpoint.txt")
CELLS = (("unstructured 50%", "dense"), ("2:4", "dense"), ("2:4", "compressed"))


def measure(nbytes: int, runs: int, folder: Path) -> list[str]:
    """The table's lines."""
    source = folder / "source"
    source.mkdir()
    largest = nbytes // 16
    weight = torch.randn(largest // 2 // COLUMNS, COLUMNS).bfloat16()
    for shard in range(4):
        names = [f"layers.{4 * shard + i}.weight" for i in range(4)]
        save_file(
            {name: weight + i for i, name in enumerate(names)}, source / f"{shard}.safetensors"
        )
    os.sync()
    lines = [
        f"sparsify_checkpoint, {nbytes >> 20} MiB of bf16 in 4 shards; medians of {runs}",
        f"{'pattern':<19}{'layout':<12}{'copy':>6}{'engine':>8}{'ours':>7}{'/(copy + engine)':>18}",
    ]
    sparsifier = fxs.DataNormSparsifier()
    for pattern, layout in CELLS:
        config = SparsityConfig.parse(pattern)
        mapping = fxs.SparsityMapping().set_global(pattern)

        def copy() -> None:
            shutil.copytree(source, folder / "target")
            for path in (*(folder / "target").iterdir(), folder / "target", folder):
                sync(path)

        def engine(config: SparsityConfig = config) -> None:
            own = {"pattern": config.pattern, "sparsity_level": config.level}
            for _ in range(16):
                sparsifier.mask_for("w", weight, **own)

        def ours(mapping: fxs.SparsityMapping = mapping, layout: str = layout) -> None:
            fxs.sparsify_checkpoint(source, folder / "target", mapping, layout=layout)

        times: dict[str, list[float]] = {"copy": [], "engine": [], "ours": []}
        for _ in range(runs):
            for work in (copy, engine, ours):
                shutil.rmtree(folder / "target", ignore_errors=True)
                os.sync()
                started = time.perf_counter()
                work()
                times[work.__name__].append(time.perf_counter() - started)
        medians = {name: statistics.median(found) for name, found in times.items()}
        ratio = medians["ours"] / (medians["copy"] + medians["engine"])
        lines.append(
            f"{pattern:<19}{layout:<12}{medians['copy']:>6.1f}{medians['engine']:>8.2f}"
            f"{medians['ours']:>7.1f}{ratio:>18.2f}"
        )
        print(lines[-1], flush=True)
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Print the table; `--write` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    MASKS.ready()
    print(first := machine(STORAGE, "seconds"), flush=True)
    folder = Path(tempfile.mkdtemp())
    try:
        lines = [first, *measure(options.megabytes << 20, options.runs, folder)]
    finally:
        shutil.rmtree(folder)
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
