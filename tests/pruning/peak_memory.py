"""Bytes that a call allocates, counted by torch's allocator itself, and what they are to be.

The account is independent of the walk: every batch goes through the graph of the dense model node
by node, all of them together, each value until its last use.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from fx_sparsity.graph.example_inputs import call_arguments
from fx_sparsity.graph.frontends import export_model


def peak_bytes(call: Callable[[], Any]) -> tuple[int, Any]:
    """(the most bytes of CPU tensors at a time beyond those at the start, what `call` returns)."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most, result


class _Each:
    """One value a batch."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values


class _Together(fx.Interpreter):
    """All batches through one node after the other, as far as the last product."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        self.last = products[-1]
        self.done = False

    def run_node(self, n: fx.Node) -> Any:
        self.done |= n is self.last
        return None if self.done or n.op == "call_module" else super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        count = next((len(v.values) for v in leaves if isinstance(v, _Each)), 0)
        if not count:
            return target(*args, **kwargs)
        results = []
        for batch in range(count):
            mine = [v.values[batch] if isinstance(v, _Each) else v for v in leaves]
            one_args, one_kwargs = pytree.tree_unflatten(mine, spec)
            results.append(target(*one_args, **one_kwargs))
        return _Each(results)


@torch.no_grad()
def live_activations(model: nn.Module, batches: list[Any]) -> int:
    """The most bytes that activations of all batches take at a node of the dense model."""
    graph = export_model(model, batches[0]).module()
    graph.graph.output_node().args = ([],)  # what it returns, such as a cache, need not be kept
    flat = [pytree.tree_leaves(call_arguments(batch)) for batch in batches]
    inputs = [_Each(list(values)) for values in zip(*flat, strict=True)]
    run = _Together(graph)
    run.env = {}
    most, _ = peak_bytes(lambda: run.run(*inputs, enable_io_processing=False))
    return most


def mask_bytes(model: nn.Module) -> int:
    """Of the masks that are put on every matrix: part of the result, a byte a weight."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2)
