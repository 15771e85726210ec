"""What a wheel brings compiled: `python -m fx_sparsity._native.wheel FOLDER`, for setup.py."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from fx_sparsity._native import BUILT_AHEAD, instruction_sets
from fx_sparsity._native.compiler import BuildError


def compile_into(folder: Path) -> None:
    """Compile every library for every instruction set; the folder gets all of them, or none.

    Raises:
        BuildError: one of them cannot be built.
    """
    with tempfile.TemporaryDirectory() as unfinished:
        for library in BUILT_AHEAD:
            for instructions in instruction_sets.compiled_for():
                print(library.build_for_wheel(Path(unfinished), instructions).name, flush=True)
        shutil.copytree(unfinished, folder, ignore=shutil.ignore_patterns("*.lock"))


def main() -> int:
    """Compile, naming each file; the exit status is not zero if a library cannot be built."""
    parser = argparse.ArgumentParser(
        prog="python -m fx_sparsity._native.wheel", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="that does not exist yet")
    try:
        compile_into(parser.parse_args().folder)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
