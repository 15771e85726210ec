"""The command line, `fx-sparsity`; needs the packages of `pip install "fx_sparsity[cli]"`."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with its code.

    Args:
        arguments: those of the process by default.
    """
    try:
        from fx_sparsity.cli.commands import commands
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich", "yaml"):
            raise
        print(
            f'fx-sparsity needs {error.name}: pip install "fx_sparsity[cli]"',
            file=sys.stderr,
        )
        sys.exit(3)
    commands(arguments, prog_name="fx-sparsity")
