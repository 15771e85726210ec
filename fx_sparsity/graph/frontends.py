"""From a model to its graphs: `torch.export` first, and what shows its weights where that fails."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph.compiled import capture_graphs, is_compiled
from fx_sparsity.graph.example_inputs import (
    ExampleInputs,
    call_arguments,
    run_undisturbed,
    undisturbed,
)
from fx_sparsity.graph.opaque import exportable
from fx_sparsity.graph.operators import MODULES
from fx_sparsity.graph.sources import (
    Source,
    compiled_source,
    exported_source,
    graph_source,
    module_source,
)

Model = nn.Module | fx.GraphModule | ExportedProgram


class CaptureError(FxSparsityError, RuntimeError):
    """The model runs, but no graph of it can be captured."""


@dataclass(frozen=True)
class Frontend:
    """What one way of looking at a model shows.

    Attributes:
        name: as `WeightMap.frontend` lists it.
        graphs: each with the tensors that its nodes stand for.
        classes: the model, where the classes of its modules are all there is to look at.
        gaps: why parameters may be missing; empty where every one that counts is shown.
    """

    name: str
    graphs: Sequence[tuple[fx.GraphModule, Source]] = ()
    classes: nn.Module | None = None
    gaps: str = ""


def frontends(
    subject: Model,
    example_inputs: ExampleInputs | None,
    dynamic_shapes: Any = None,
    model: nn.Module | None = None,
) -> Iterator[Frontend]:
    """Ways to look at a model, each tried when it is asked for, the one that shows most first.

    Graphs and programs are read as they are. See `find_weights` for the arguments.

    Raises:
        InputError: the module rejects `example_inputs`.
    """
    if isinstance(subject, ExportedProgram):
        graph = subject.graph_module, exported_source(subject)
        yield Frontend("ExportedProgram", [graph])
    elif isinstance(subject, fx.GraphModule):
        name, gaps = "GraphModule", ""
        if is_compiled(subject):
            name, gaps = "torch.compile", "no input of this graph"
        yield Frontend(name, [(subject, graph_source(subject, example_inputs, model))], gaps=gaps)
    elif example_inputs is None:
        name = "module classes, without example inputs"
        yield Frontend(name, classes=subject, gaps="no example inputs")
    else:
        try:
            program = export_model(subject, example_inputs, dynamic_shapes)
        except CaptureError as error:
            yield from _without_export(subject, example_inputs, error)
        else:
            yield Frontend("torch.export", [(program.graph_module, exported_source(program))])


def _without_export(
    model: nn.Module, example_inputs: ExampleInputs, error: CaptureError
) -> Iterator[Frontend]:
    """What is left to look at: Dynamo's graphs, a symbolic trace, the classes of modules.

    Args:
        model: that cannot be exported.
        example_inputs: that it takes.
        error: what `export_model` raised.
    """
    gaps = f"torch.export: {type(error.__cause__ or error).__name__}"
    args, kwargs = call_arguments(example_inputs)
    with undisturbed(model):
        graphs, stop = capture_graphs(model, args, kwargs)
    if graphs or stop:
        count = f"{len(graphs)} graph{'' if len(graphs) == 1 else 's'}"
        name = f"Dynamo ({count}{f', then {type(stop).__name__}' if stop else ''})"
        found = [(gm, compiled_source(gm, inputs, model)) for gm, inputs in graphs]
        yield Frontend(name, found, gaps=gaps)
    try:
        traced = trace_model(model)
    except Exception as trace_error:  # whatever the model's own code raises on proxies
        yield Frontend(f"no FX trace ({type(trace_error).__name__})", gaps=gaps)
    else:
        yield Frontend("FX trace", [(traced, module_source(traced))], gaps=gaps)
    yield Frontend("module classes", classes=model, gaps=gaps)


def export_model(
    model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any = None
) -> ExportedProgram:
    """Capture a model with `torch.export`, non-strict and undecomposed: the canonical graph.

    The model is not changed, nor run on data. Inputs and outputs that are no pytrees, such as
    caches, count as the tensors that they hold, in the order of `opaque.expanded`.

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
        with exportable(model, args, kwargs) as (args, kwargs):
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as export_error:
        run_undisturbed(model, example_inputs)
        raise CaptureError(
            f"{type(model).__name__} runs on example_inputs, but torch.export cannot capture it: "
            f"{type(export_error).__name__}: {export_error}"
        ) from export_error


def trace_model(model: nn.Module) -> fx.GraphModule:
    """Trace a model symbolically, with every module opened up but those that the table knows.

    Raises:
        Exception: whatever the model's code raises when it is run on proxies.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            holds = any(parameter.ndim >= 2 for parameter in m.parameters())
            known = isinstance(m, tuple(MODULES))
            return known or (not holds and super().is_leaf_module(m, module_qualified_name))

    return fx.GraphModule(model, Tracer().trace(model))
