"""The tensors of modules and programs by name, ties included."""

from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, under each of their names."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def exported_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, then buffers and constants, by FQN; a tied tensor is one object.

    A program that was saved and loaded holds ties as several tensors over one storage, in an order
    of its own.
    """
    signature, held = program.graph_signature, {**program.state_dict, **program.constants}
    tensors = {name: held[name] for name in signature.parameters} | held
    first: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            tensors[name] = first.setdefault(place, tensor)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
