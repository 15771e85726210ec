"""The canonical graph of a model: `torch.export`, non-strict and undecomposed."""

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.example_inputs import ExampleInputs, call_arguments, run_undisturbed


class CaptureError(FxSparsityError, RuntimeError):
    """The model runs, but no graph of it can be captured."""


def export_model(
    model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any = None
) -> ExportedProgram:
    """Capture a model with `torch.export`, non-strict and undecomposed: the canonical graph.

    The model is not changed, nor run on data.

    Args:
        model: in the mode (train, eval) that is to be captured.
        example_inputs: a tuple of positional, or a dict of keyword arguments.
        dynamic_shapes: as `torch.export.export` takes it; a plain export accepts no other shapes
            than the example's.

    Raises:
        InputError: the model rejects the inputs, with its own words.
        CaptureError: the model runs on them but cannot be exported, with torch's words.
    """
    args, kwargs = call_arguments(example_inputs)
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as export_error:
        run_undisturbed(model, lambda: model(*args, **kwargs))
        raise CaptureError(
            f"{type(model).__name__} runs on example_inputs, but torch.export cannot capture it: "
            f"{type(export_error).__name__}: {export_error}"
        ) from export_error
