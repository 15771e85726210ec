"""A model over the memory maps of a checkpoint."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.checkpoints.checkpoint import CheckpointError
from fx_sparsity.graph.sources import named_tensors
from fx_sparsity.graph.uses import canonical_fqn

_SHOWN = 8  # misfits


class LoadedModel:
    """A copy of a model over a checkpoint's memory maps.

    Args:
        model: not changed.
        held: the checkpoint.
        names: FQN in the model -> name in the checkpoint, where they differ.

    Attributes:
        model: the copy. Its buffers are in memory.
        names: identity of each tensor of the copy -> its names in the checkpoint.
        by_fqn: canonical FQN -> the same names.
        surplus: names in the checkpoint that stand for nothing in the model.

    Raises:
        CheckpointError: they do not fit; every tensor concerned is named.
    """

    def __init__(
        self, model: nn.Module, held: Mapping[str, Tensor], names: Mapping[str, str]
    ) -> None:
        tensors = named_tensors(model)
        parameters = {id(parameter) for parameter in model.parameters()}
        unknown = names.keys() - dict(tensors).keys()
        wrong = [f"{fqn}: names speaks of it, the model has none" for fqn in sorted(unknown)]
        fqns: dict[int, list[str]] = {}
        for fqn, tensor in tensors:
            fqns.setdefault(id(tensor), []).append(fqn)
        memo: dict[int, Any] = {}
        self.names: dict[int, list[str]] = {}
        self.by_fqn: dict[str, list[str]] = {}
        for tensor in {id(tensor): tensor for _, tensor in tensors}.values():
            mine = fqns[id(tensor)]
            found = [name for fqn in mine if (name := names.get(fqn, fqn)) in held]
            if reason := _misfit(tensor, [held[name] for name in found], id(tensor) in parameters):
                wrong.append(f"{mine[0]}: {reason}")
            elif found:
                data = held[found[0]]
                if id(tensor) in parameters:
                    new: Tensor = nn.Parameter(data, tensor.requires_grad)
                else:
                    new = data.clone()
                memo[id(tensor)] = new
                self.names[id(new)] = found
                self.by_fqn |= dict.fromkeys(map(canonical_fqn, mine), found)
        if wrong:
            more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise CheckpointError(
                f"the checkpoint does not fit this {type(model).__name__}:\n  "
                + "\n  ".join(wrong[:_SHOWN])
                + more
            )
        used = {name for found in self.names.values() for name in found}
        self.surplus = [name for name in held if name not in used]
        self.model = copy.deepcopy(model, memo)


def _misfit(tensor: Tensor, found: Sequence[Tensor], parameter: bool) -> str:
    """Why a tensor of a model cannot be what a checkpoint holds under its names; empty if it can.

    Args:
        tensor: of the model.
        found: of the checkpoint, by all names of the tensor.
        parameter: whether it is one.
    """
    if not found and parameter:
        return "the checkpoint lacks it; names={...} tells of other names"
    if not found:
        return (
            "a buffer that the checkpoint lacks, and that has no data on the meta device; build "
            "the model under parameters_on_meta(), where buffers are real"
            if tensor.is_meta
            else ""
        )
    data = found[0]
    if data.shape != tensor.shape:
        return f"expected shape {tuple(tensor.shape)}, the checkpoint has {tuple(data.shape)}"
    floats = tensor.is_floating_point() and data.is_floating_point() and data.itemsize > 1
    if data.dtype != tensor.dtype and not floats:
        return f"expected {tensor.dtype}, the checkpoint has {data.dtype}"
    if any(not same_bits(data, other) for other in found[1:]):
        return "tied in the model, but the checkpoint has different values under its names"
    return ""


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape, and equal bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
