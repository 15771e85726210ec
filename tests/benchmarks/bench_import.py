"""What `import fx_sparsity` takes, next to `import torch` alone.

    python -m tests.benchmarks.bench_import --check

Fresh processes, one library after the other so that both see the same machine, and medians. The first
run of each is dropped: it leaves the bytecode behind that an installed package comes with.

Of what fx_sparsity adds on CPython 3.11, half is one garbage collection over all of torch's objects, which is
due then, a fifth are the methods that dataclasses generate, and the rest is its modules.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

from fx_sparsity.reports import format_table

BAR = 1.25
LIBRARIES = ("torch", "fx_sparsity")


def seconds(library: str) -> float:
    """Of a process that imports a library and does nothing else."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {library}"], env=environment, check=True)
    return time.perf_counter() - start


def measure(runs: int) -> dict[str, float]:
    """Library -> median seconds."""
    rounds = [[seconds(library) for library in LIBRARIES] for _ in range(runs + 1)][1:]
    return dict(zip(LIBRARIES, map(median, zip(*rounds, strict=True)), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What `import fx_sparsity` takes.")
    parser.add_argument("--check", action="store_true", help="Exit with 1 where the bar is missed.")
    parser.add_argument("--list", action="store_true", help="Say what the bar is, and do not run.")
    parser.add_argument("--runs", type=int, default=15, help="Processes for each library.")
    options = parser.parse_args(arguments)
    bar = f"import fx_sparsity takes at most {BAR} times import torch"
    if options.list:
        print(bar)
        return 0
    times = measure(options.runs)
    ratio = times["fx_sparsity"] / times["torch"]
    rows = [(library, times[library], times[library] / times["torch"]) for library in LIBRARIES]
    print(format_table(["import", "seconds", "times torch"], rows))
    met = ratio <= BAR
    print(f"\n{bar}: {'met' if met else 'MISSED'}")
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
