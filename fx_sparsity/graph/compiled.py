"""What `torch.compile` knows about a graph that it hands to a backend.

The one place that touches `torch._dynamo` and the notes that Dynamo and AOTAutograd leave on
placeholders: there is no public way to tell which parameter a placeholder stands for, nor to keep
on capturing after a graph break.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

_UNLIMITED = 1 << 30
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\.(\w+)|\[(\d+)\]")


def capture_graphs(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[tuple[fx.GraphModule, Sequence[Any]]], Exception | None]:
    """Run a model under Dynamo, and keep every graph that it hands to its backend.

    The limit on recompilations is lifted, for repeated captures of one model count as such, and
    recurrent networks are let in, which Dynamo otherwise runs eagerly.

    Returns:
        Graphs with their example inputs, in the order of capture; and what ended it early, if
        the call raised.
    """
    graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((gm, example_inputs))
        return gm.forward

    with torch._dynamo.config.patch(
        allow_rnn=True, recompile_limit=_UNLIMITED, accumulated_recompile_limit=_UNLIMITED
    ):
        try:
            torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
        except Exception as error:
            return graphs, error
    return graphs, None


def source_target(node: fx.Node) -> str | None:
    """FQN of the module attribute that a placeholder of a Dynamo graph stands for.

    Dynamo notes how it found the tensor, such as `L['self']._modules['fc']._parameters['weight']`;
    the FQN counts from the module whose code was compiled. None for other inputs.
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    text = source.name() if callable(source.name) else source.name
    if not re.search(r"\._(parameters|buffers)\['[^']+'\]$", text):
        return None
    path = text.partition("]")[2]
    return ".".join(next(filter(None, step)) for step in _STEP.findall(path))


def is_compiled(gm: fx.GraphModule) -> bool:
    """Whether a graph comes from Dynamo or AOTAutograd, going by the notes on its placeholders."""
    return any(
        "desc" in node.meta or hasattr(node, "_dynamo_source")
        for node in gm.graph.find_nodes(op="placeholder")
    )


def input_target(node: fx.Node) -> str | None:
    """FQN that AOTAutograd noted on a placeholder, where it lifted a module's parameters itself."""
    return getattr(node.meta.get("desc"), "target", None)


def input_position(node: fx.Node, position: int) -> int:
    """Which input of the Dynamo graph a placeholder is; `position` where no note says otherwise."""
    return getattr(node.meta.get("desc"), "idx", position)
