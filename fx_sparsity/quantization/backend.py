"""What a quantization backend is: how to quantize a model, and how to read what it stores."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from fx_sparsity.graph import WeightMap
from fx_sparsity.graph.capture import ExampleInputs, call_arguments

Calibrate = Callable[[nn.Module], Any]


class BackendError(ValueError):
    """A backend is unknown, not installed, or cannot do what was asked."""


class Quantized(NamedTuple):
    """What a backend returns.

    Attributes:
        model: quantized.
        meant: FQNs of the weights that the configuration asked to quantize.
    """

    model: nn.Module
    meant: frozenset[str]


class Backend(ABC):
    """One way to quantize. A new backend is one file with one subclass, and one line in `BACKENDS`.

    Attributes:
        name: as users give it.
    """

    name: str

    @abstractmethod
    def quantize(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weights: WeightMap,
        *,
        calibrate: Calibrate | None = None,
        config: Any = None,
        dynamic_shapes: Any = None,
    ) -> Quantized:
        """Run the backend's own prepare and convert. `model` is not changed.

        Args:
            model: in float, without live masks.
            example_inputs: a tuple of positional, or a dict of keyword arguments.
            weights: what discovery found in the model.
            calibrate: runs the observed model on data; the example inputs by default.
            config: the backend's own; None is int8 linears and 8-bit embeddings whose zero is a
                code.
            dynamic_shapes: as `torch.export.export` takes it.
        """


BACKENDS: dict[str, tuple[str, str, str]] = {
    "eager": ("fx_sparsity.quantization.eager", "EagerBackend", ""),
    "pt2e": ("fx_sparsity.quantization.pt2e", "PT2EBackend", "pt2e"),
}
"""Name -> module, class, and the extra that it needs."""


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: unknown, or its package is not installed; says which extra brings it.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, found {name!r}")
    module, attribute, extra = BACKENDS[name]
    try:
        return getattr(import_module(module), attribute)()
    except ModuleNotFoundError as error:
        raise BackendError(
            f"backend {name!r} needs {error.name}, which is not installed: "
            f'pip install "fx_sparsity[{extra}]"'
        ) from error


def run_example(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Calibrate on the example inputs."""
    args, kwargs = call_arguments(example_inputs)
    model(*args, **kwargs)
