"""Names of other libraries that are not here, and what to use instead."""

from collections.abc import Mapping
from typing import NoReturn

STRUCTURED = dict.fromkeys(
    (
        "BaseStructuredSparsifier",
        "BiasHook",
        "FPGMPruner",
        "FakeStructuredSparsity",
        "LSTMSaliencyPruner",
        "SaliencyPruner",
    ),
    "taking whole rows and channels out of a model is to come. Until then the pattern 'rows 50%' "
    "masks them, and torch.ao.pruning._experimental.pruner takes them out",
)
"""Names of structured pruning, which torch.ao.pruning and torchao share."""


def refuse(module: str, name: str, instead: Mapping[str, str]) -> NoReturn:
    """Raise for a name that a module does not have; for its `__getattr__`.

    Args:
        module: its name.
        name: what was asked for.
        instead: names that readers may look for -> why they are absent, and what to use.

    Raises:
        ImportError: the name is in `instead`. Not AttributeError, which `from ... import` replaces
            by an error of its own that does not say why.
        AttributeError: it is not.
    """
    if name in instead:
        raise ImportError(f"{module} has no {name}: {instead[name]}")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
