"""What pruning takes from the mean of a layer's outputs, given back."""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fx_sparsity.graph.operators import OPERATORS, bind
from fx_sparsity.pruning.batches import Batch, Frame
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
