"""What pruning takes from the mean of a layer's outputs, given back."""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fx_sparsity.graph.calls import bind
from fx_sparsity.graph.operators import OPERATORS
from fx_sparsity.pruning.batches import Batch, Frame, is_exported, over_same_tensors
from fx_sparsity.pruning.plan import Plan


def find_biases(frame: Frame, plans: Mapping[str, Plan]) -> dict[str, Tensor]:
    """FQN of a weight -> the parameter that its one consumer adds, one value an output.

    Weights with several uses have none, nor those whose bias something else reads, too. Without a
    graph there are none yet: they are only known when the model has run.
    """
    found: dict[str, Tensor] = {}
    for fqn, plan in plans.items() if frame.captured else ():
        mine = frame.uses_of(fqn)
        if len(mine) != 1 or plan.table or mine[0].use.slice is not None:
            continue
        node = bind(mine[0].node).get(OPERATORS[mine[0].use.op].bias)
        if not isinstance(node, fx.Node) or node.op != "get_attr" or len(node.users) > 1:
            continue
        bias = operator.attrgetter(str(node.target))(frame.captured[0].graph)
        if isinstance(bias, nn.Parameter) and fits(bias, plan):
            found[fqn] = bias
    return found


def fits(bias: Tensor, plan: Plan) -> bool:
    """Whether a bias has one value for each output of a weight."""
    return bias.numel() == plan.form.sizes[0] * plan.form.sizes[1]


@torch.no_grad()
def estimate_batch_norms(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Measure the running statistics of every batch norm anew, as a mean over the batches.

    Args:
        model: its modes are as before afterwards.
        batches: every one counts the same.

    Returns:
        How many batch norms there were.
    """
    if is_exported(model):
        return _estimate_in_graph(model, batches)
    kinds = (nn.modules.batchnorm._BatchNorm,)
    norms = [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]
    if not norms:
        return 0
    before = [(norm, norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
            norm.training = True
        for batch in batches:
            batch.call(model)
    finally:
        for norm, momentum, training in before:
            norm.momentum, norm.training = momentum, training
    return len(norms)


def _estimate_in_graph(model: fx.GraphModule, batches: Sequence[Batch]) -> int:
    """The same where batch norms are operators: in a copy of the graph they train."""
    graph = over_same_tensors(model)
    norms = graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.batch_norm.default, sort=False
    )
    norms = [node for node in norms if isinstance(bind(node)["running_mean"], fx.Node)]
    for count, batch in enumerate(batches if norms else (), 1):
        for node in norms:
            node.update_arg(5, True)  # training
            node.update_arg(6, 1 / count)  # momentum of a plain mean
        graph.recompile()
        batch.call(graph)
    for node in norms:
        path, _, _ = str(bind(node)["running_mean"].target).rpartition(".")
        counter = getattr(graph.get_submodule(path), "num_batches_tracked", None)
        if counter is not None:
            counter.fill_(len(batches))
    return len(norms)
