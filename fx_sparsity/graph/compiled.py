"""What `torch.compile` knows about a graph that it hands to a backend.

The one place that touches `torch._dynamo`, and the notes that Dynamo and AOTAutograd leave on
inputs and outputs: there is no public way to tell which parameter a placeholder stands for or which
results are gradients, to add a buffer to a graph, nor to keep on capturing after a graph break.
Dynamo takes as long to import as torch itself, so functions import it that need it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.graph import _PyTreeCodeGen

_UNLIMITED = 1 << 30
_HOLDERS = ("__dict__", "_modules", "_parameters", "_buffers")
"""Attributes of modules that are on the way to what they register; no FQN has them in it."""


def capture_graphs(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[tuple[fx.GraphModule, Sequence[Any]]], Exception | None]:
    """Run a model under Dynamo, and keep every graph that it hands to its backend.

    The limit on recompilations is lifted, for repeated captures of one model count as such, and
    recurrent networks are let in, which Dynamo otherwise runs eagerly.

    Returns:
        Graphs with their inputs, in the order of capture, once for each set of parameters that they
        ran with; and what ended it early, if the call raised.
    """
    graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    seen: set[tuple[int, ...]] = set()

    def note(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        held = (id(gm), *(id(value) for value in inputs if isinstance(value, nn.Parameter)))
        if held not in seen:
            seen.add(held)
            graphs.append((gm, inputs))

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        note(gm, example_inputs)

        def run(*inputs: Any) -> Any:
            note(gm, inputs)  # one graph serves all modules of a class
            return gm.forward(*inputs)

        return run

    import torch._dynamo

    with torch._dynamo.config.patch(
        allow_rnn=True, recompile_limit=_UNLIMITED, accumulated_recompile_limit=_UNLIMITED
    ):
        try:
            torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
        except Exception as error:
            return graphs, error
    return graphs, None


def inductor() -> Callable[..., Any]:
    """Inductor, as a backend to hand a graph on to: (graph, example inputs, config_patches=)."""
    return named_backend("inductor")


def mode_options(mode: str | None) -> dict[str, Any]:
    """The options that a mode of Inductor, such as `"reduce-overhead"`, stands for; {} of None.

    Raises:
        RuntimeError: an unknown mode.
    """
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    found: dict[str, Any] = list_mode_options(mode)
    return found


def named_backend(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """A backend that torch knows by name; any other is what it is.

    Raises:
        RuntimeError: a name that torch does not know.
    """
    from torch._dynamo import lookup_backend

    found: Callable[..., Any] = lookup_backend(backend)
    return found


def compiled_callable() -> object:
    """What `torch.compile` was given whose graph a backend is handed right now.

    What Dynamo notes on a graph leads to the code around it, and after a graph break that may be
    but a submodule; the wrapper that `torch.compile` made is on the stack.

    Returns:
        A module, also where it was one of its methods; or a function. None where a backend is
        called by hand.
    """
    from torch._dynamo import eval_frame

    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__:
            called = inspect.unwrap(frame.f_locals["fn"])
            if not isinstance(called, MethodType):
                return called
            bound = called.__self__
            return bound if isinstance(bound, nn.Module) else called.__func__
        frame = frame.f_back
    return None


def guard_identity(tensors: Iterable[Tensor]) -> None:
    """Have Dynamo compile anew where inputs of its graph are other tensors than these.

    Weights are inputs, and Dynamo lets one graph serve all modules of a class. What was made for
    the values or the masks of one of them must not serve another.

    The module that a local variable holds on the way to a tensor is guarded, too: Dynamo's limit on
    recompilations counts for each such module, and not for all modules of the class together.

    Args:
        tensors: that the graph receives which is being compiled. Where a backend is called by hand
            there are no guards, and nothing is done.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import LocalSource
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None:
        return
    for tensor in tensors:
        source = getattr(context.tensor_to_context.get(tensor), "tensor_source", None)
        if source is None:
            continue
        root = source
        while (base := getattr(root, "base", None)) is not None:
            root = base
        for guarded in (root, source) if isinstance(root, LocalSource) else (source,):
            context.guards_context.dynamo_guards.add(guarded.make_guard(GuardBuilder.ID_MATCH))


def source_target(node: fx.Node) -> str | None:
    """FQN of the module attribute that a placeholder of a Dynamo graph stands for.

    Dynamo notes how it found the tensor, as a chain of sources: attributes and items, from the
    tensor back to a local or global variable. The FQN counts from the first module on that way, the
    one whose code was compiled. None for other inputs.
    """
    steps = _steps(getattr(node, "_dynamo_source", None))
    if len(steps) < 2 or steps[-2] not in ("_parameters", "_buffers"):
        return None
    return ".".join(step for step in steps if step not in _HOLDERS)


def _steps(source: Any) -> list[str]:
    """Attributes and items that lead from the first module on the way of a source to its end."""
    if source is None:
        return []
    from torch._dynamo.source import NNModuleSource

    steps: list[str] = []
    of_module = 0
    while source is not None:
        of_module = len(steps) if isinstance(source, NNModuleSource) else of_module
        step = getattr(source, "index", getattr(source, "member", None))
        steps += [] if step is None else [str(step)]
        source = getattr(source, "base", None)
    return steps[:of_module][::-1]


def is_compiled(gm: fx.GraphModule) -> bool:
    """Whether a graph comes from Dynamo or AOTAutograd, going by the notes on its placeholders.

    The module of an exported program that was decomposed has such notes, too, but holds its weights
    itself; it is known by its signature, which is that of a module and not flat.
    """
    noted = any(
        "desc" in node.meta or hasattr(node, "_dynamo_source")
        for node in gm.graph.find_nodes(op="placeholder")
    )
    return noted and not isinstance(gm.graph._codegen, _PyTreeCodeGen)


def is_of_dynamo(gm: fx.GraphModule) -> bool:
    """Whether a graph is as Dynamo made it, before AOTAutograd."""
    return any(hasattr(node, "_dynamo_source") for node in gm.graph.find_nodes(op="placeholder"))


def is_dynamo_body(gm: fx.GraphModule) -> bool:
    """Whether a graph is the body of an operator in one of Dynamo's, such as a compiled region.

    Dynamo notes where tensors come from on the graph around it alone. What was traced or exported
    has the values of its inputs noted, as AOTAutograd does it, or holds parameters.
    """
    traced = any("val" in node.meta for node in gm.graph.find_nodes(op="placeholder"))
    return not traced and not is_of_dynamo(gm) and next(gm.parameters(), None) is None


def input_target(node: fx.Node) -> str | None:
    """FQN that AOTAutograd noted on a placeholder, where it lifted a module's tensors itself."""
    return getattr(node.meta.get("desc"), "target", None)


def input_position(node: fx.Node, position: int) -> int | None:
    """Which input of the Dynamo graph a placeholder is; None for tangents and saved activations.

    Args:
        node: a placeholder.
        position: its own among the placeholders, which counts in the Dynamo graph itself.
    """
    if hasattr(node, "_dynamo_source"):
        return position
    desc = node.meta.get("desc")
    return getattr(desc, "idx", None) if type(desc).__name__ == "PlainAOTInput" else None


def fake_names(gm: fx.GraphModule, tensors: Mapping[str, Tensor]) -> dict[Any, str]:
    """What `fake_place` gives of a placeholder -> FQN of the tensor that it stands for.

    Dynamo and AOTAutograd trace with fake tensors, one for each real tensor, whose memory the notes
    on placeholders share. A backward pass is compiled after that book has been closed.
    """
    values = [_value(node) for node in gm.graph.find_nodes(op="placeholder")]
    fake = next((value for value in values if isinstance(value, FakeTensor)), None)
    if fake is None:
        return {}
    known = fake.fake_mode.fake_tensor_converter
    faked = {fqn: known._get_memo(tensor) for fqn, tensor in reversed(list(tensors.items()))}
    return {_place(value): fqn for fqn, value in faked.items() if value is not None}


def fake_place(node: fx.Node) -> Any:
    """Where the fake tensor of a placeholder lies, and how; None where that is no one place."""
    value = _value(node)
    known = isinstance(value, FakeTensor) and all(isinstance(size, int) for size in value.shape)
    return _place(value) if known else None  # type: ignore[arg-type]


def _value(node: fx.Node) -> object:
    """What AOTAutograd, or else Dynamo, noted as the value of a placeholder."""
    return node.meta.get("val", node.meta.get("example_value"))


def is_fake(tensor: object) -> bool:
    """Whether a tensor only stands for one that is traced, and has no data."""
    return isinstance(tensor, FakeTensor)


def real_tensors() -> AbstractContextManager[object]:
    """Where new tensors have data, also while AOTAutograd compiles, when they would be fake."""
    return unset_fake_temporarily()


def returned(graph: fx.Graph) -> list[fx.Node]:
    """The results of a graph, without gradients and what is kept for a backward pass."""
    output = graph.output_node()
    descs = output.meta.get("desc")
    if descs is None:
        return output.all_input_nodes
    pairs = zip(output.args[0], descs, strict=True)  # type: ignore[arg-type]
    return [v for v, desc in pairs if isinstance(v, fx.Node) and not _for_backward(desc)]


def has_backward(gm: fx.GraphModule) -> bool:
    """Whether AOTAutograd has traced a backward pass along with this graph, or it is one."""
    return any(map(_for_backward, gm.graph.output_node().meta.get("desc") or ()))


def announce_buffers(gm: fx.GraphModule, names: Iterable[str]) -> None:
    """Let AOTAutograd take buffers of a Dynamo graph that Dynamo itself did not put there."""
    from torch._dynamo.source import ConstantSource

    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources.update((name, ConstantSource(name)) for name in names)


def _place(fake: FakeTensor) -> Any:
    storage = fake.untyped_storage()._cdata
    return storage, fake.dtype, fake.shape, fake.stride(), fake.storage_offset()


def _for_backward(desc: object) -> bool:
    return type(desc).__name__.startswith(("GradAOT", "SavedForBackwards"))
