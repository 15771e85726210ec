"""Calling a function when some other package gets imported, without importing it."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, then: Callable[[], object]) -> None:
    """Call a function once a module is there: now, or right after it has been imported.

    Args:
        name: of the module, with its packages.
        then: what to call.
    """
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Once(name, then))


class _Once(MetaPathFinder):
    """Finds one module the way others do, and has a function called after it was executed."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `MetaPathFinder`."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            self._then()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
