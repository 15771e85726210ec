"""What a quantization backend is: a prepare and a convert, and how to read what is stored."""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph import WeightMap, WeightSite
from fx_sparsity.graph.example_inputs import ExampleInputs, InputError, call_arguments
from fx_sparsity.graph.frontends import CaptureError
from fx_sparsity.sparsifier.mask import masked_weights
from fx_sparsity.verification.read import READERS
from fx_sparsity.verification.stored import StoredWeight

Calibrate = Callable[[nn.Module], Any]


class BackendError(FxSparsityError, ValueError):
    """A backend is unknown, not installed, or cannot do what was asked."""


@dataclass(frozen=True)
class Prepared:
    """A model between a quantizer's prepare and its convert.

    Attributes:
        model: with observers, or with fake quantization.
        meant: FQNs, in the float model, of the weights that the configuration asks to quantize.
        moved: FQN in the float model -> FQN in `model`, for weights that prepare moved.
        config: the backend's own, for its convert.
        in_float: FQN in the float model -> the reason why a weight is not meant.
    """

    model: nn.Module
    meant: frozenset[str]
    moved: Mapping[str, str] = field(default_factory=dict)
    config: Any = None
    in_float: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantized:
    """What a backend returns; it unpacks into `model` and `meant`.

    Attributes:
        model: quantized.
        meant: FQNs of the weights that the configuration asked to quantize.
        in_float: FQN -> the reason why a weight was not meant.
    """

    model: nn.Module
    meant: frozenset[str]
    in_float: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.meant


class Backend(ABC):
    """One way to quantize. A new backend is one file with one subclass, and one line in `BACKENDS`.

    Neither `prepare` nor `convert` changes torch's random state.

    Attributes:
        name: as users give it.
        observes: whether there is anything to calibrate between prepare and convert.
    """

    name: str
    observes: bool = True

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weights: WeightMap,
        *,
        config: Any = None,
        dynamic_shapes: Any = None,
        qat: bool = False,
    ) -> Prepared:
        """The backend's own prepare, on a copy; in inference mode unless it is to be trained.

        Args:
            model: in float, without live masks. Not changed.
            example_inputs: a tuple of positional, or a dict of keyword arguments.
            weights: what discovery found in the model.
            config: the backend's own; None is int8 linears, and 8-bit embeddings whose zero is a
                code.
            dynamic_shapes: as `torch.export.export` takes it.
            qat: fake quantization to train with, instead of observers to calibrate.

        Raises:
            BackendError: live masks, or a model or configuration that it cannot take; with torch's
                words, where it was torch that refused.
        """

    @abstractmethod
    def convert(self, prepared: Prepared, example_inputs: ExampleInputs) -> Quantized:
        """The backend's own convert; `prepared` is used up. Gives a model in inference mode.

        Raises:
            BackendError: torch refuses, or what comes out does not run on the example inputs.
        """

    def read(self, model: nn.Module) -> Iterator[StoredWeight]:
        """The quantized weights that modules hold in this backend's way; none of other modules.

        Graphs are read by what their nodes do, whoever made them.
        """
        yield from ()

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
        """Prepare, calibrate and convert; see `prepare` for the arguments.

        Args:
            model: in float, without live masks. Not changed.
            example_inputs: a tuple of positional, or a dict of keyword arguments.
            weights: what discovery found in the model.
            config: the backend's own.
            dynamic_shapes: as `torch.export.export` takes it.
            calibrate: runs the observed model on data; the example inputs by default.

        Raises:
            BackendError: as `prepare` and `convert`.
        """
        prepared = self.prepare(
            model, example_inputs, weights, config=config, dynamic_shapes=dynamic_shapes
        )
        if self.observes:
            run_calibration(prepared.model, example_inputs, calibrate)
        return self.convert(prepared, example_inputs)


def used_by(site: WeightSite) -> str:
    """The operators that read a weight, for messages."""
    return " and ".join(dict.fromkeys(use.op for use in site.uses))


BACKENDS: dict[str, tuple[str, str, str]] = {
    "eager": ("fx_sparsity.quantization.torch_ao.eager", "EagerBackend", ""),
    "fx": ("fx_sparsity.quantization.torch_ao.fx", "FXBackend", ""),
    "pt2e": ("fx_sparsity.quantization.pt2e", "PT2EBackend", "torchao"),
    "torchao": ("fx_sparsity.quantization.torchao_backend", "TorchAOBackend", "torchao"),
}
"""Name -> module, class, and the package that it needs besides torch; the extra has its name."""


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


def read_quantized(model: nn.Module) -> Iterator[StoredWeight]:
    """The quantized weights of a model, by the backends that can have made it.

    Those are the ones whose package has been imported.
    """
    for name, (_, _, package) in BACKENDS.items():
        if not package or package in sys.modules:
            yield from get_backend(name).read(model)


READERS.append(read_quantized)


def run_calibration(
    model: nn.Module, example_inputs: ExampleInputs, calibrate: Calibrate | None
) -> None:
    """Let the user's function run the observed model; on the example inputs where there is none.

    Raises:
        BackendError: the observers fail on the example inputs.
    """
    with torch.no_grad():
        if calibrate is None:
            with refusing("calibration on example_inputs", model):
                run_example(model, example_inputs)
        else:
            calibrate(model)


def run_example(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run a model on its example inputs."""
    args, kwargs = call_arguments(example_inputs)
    model(*args, **kwargs)


@contextmanager
def refusing(step: str, model: nn.Module) -> Iterator[None]:
    """Where torch raises, raise in its words, saying which step it was, and of which model.

    Raises:
        BackendError: for whatever torch raises; what this library raises stays as it is.
    """
    try:
        yield
    except (BackendError, InputError, CaptureError):
        raise
    except Exception as error:
        raise BackendError(
            f"{step} does not take this {type(model).__name__}: {type(error).__name__}: {error}; "
            "exclude the modules concerned in `config`, or use another backend"
        ) from error


def copied(model: nn.Module, *, training: bool | None = False) -> nn.Module:
    """A copy of a model to quantize.

    Args:
        model: not changed.
        training: its mode; None keeps that of `model`.

    Raises:
        BackendError: it cannot be copied, since weights are computed, as by a pruning hook; it
            names them.
    """
    try:
        copy_of = copy.deepcopy(model)
    except RuntimeError as error:
        computed = [
            f"{name}.{attribute}".removeprefix(".")
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        raise BackendError(
            f"this {type(model).__name__} cannot be copied, since {', '.join(computed) or 'it'} "
            "holds what was computed; for weights that torch.nn.utils.prune masks, call "
            "prune.remove(module, name), or fx_sparsity.take_over_pruned to go on with those "
            f"masks ({error})"
        ) from error
    if training is not None:
        # Not `.train()`, which exported graphs refuse: their mode is in their operators.
        nn.Module.train(copy_of, training)
    return copy_of


@torch.no_grad()
def check_runs(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Raise if a converted model does not run.

    Raises:
        BackendError: with what torch says.
    """
    try:
        run_example(model, example_inputs)
    except Exception as error:
        raise BackendError(
            f"the quantized {type(model).__name__} does not run on example_inputs: "
            f"{type(error).__name__}: {error}; exclude the modules concerned in `config`, "
            "or use another backend"
        ) from error


def check_unmasked(model: nn.Module) -> None:
    """Raise if a model has live masks: quantizers leave masked weights in float, without a word.

    Raises:
        BackendError: naming every masked weight.
    """
    masked = masked_weights(model)
    if masked:
        raise BackendError(f"{', '.join(masked)} still masked; squash before quantizing")


def check_float32(
    model: nn.Module, fqns: Iterable[str], *, or_dtypes: Iterable[torch.dtype] = ()
) -> None:
    """Raise if weights that are to be quantized are not float32, which torch's kernels need.

    Args:
        model: that holds them.
        fqns: of those weights.
        or_dtypes: what is taken besides float32.

    Raises:
        BackendError: naming every such weight.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    taken = (torch.float32, *or_dtypes)
    other = {f: held[f].dtype for f in fqns if f in held and held[f].dtype not in taken}
    if other:
        found = ", ".join(f"{fqn} ({dtype})" for fqn, dtype in sorted(other.items()))
        raise BackendError(
            f"expected float32 weights, found {found}; call model.float() first, or use backend "
            "'torchao', which takes bfloat16"
        )
