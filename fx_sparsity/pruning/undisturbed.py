"""A model that is run for a while, and as it was afterwards but for its weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fx_sparsity.graph.passes import is_mask_name
from fx_sparsity.pruning.batches import is_exported
from fx_sparsity.sparsifier import Mask


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and a random state of its own, with operators that show their weights."""
    graph = is_exported(model)
    training = [] if graph else [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if not graph:
        model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that the model writes when it runs are put back; masks are not among them."""
    masks = {id(b) for m in model.modules() if isinstance(m, Mask) for b in m.buffers()}
    before = [
        (buffer, buffer.clone())
        for name, buffer in model.named_buffers()
        if id(buffer) not in masks and not is_mask_name(name)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
