"""Loading a model module by module, so that what is decoded meanwhile is that of one module."""

from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor, nn

from fx_sparsity.storage.compressed_file import CompressedFile
from fx_sparsity.storage.loading import read_entry
from fx_sparsity.storage.memory import empty


def own_states(
    model: nn.Module, path: str = ""
) -> Iterator[tuple[str, nn.Module, "OrderedDict[str, Any]"]]:
    """The path of every module, itself, and what it adds to the state without its children.

    Hooks that change a `state_dict` afterwards are not asked.

    Args:
        model: whose modules are listed, a shared one under each of its paths.
        path: of `model` itself.
    """
    for inner, module in model.named_modules(prefix=path, remove_duplicate=False):
        own: OrderedDict[str, Any] = OrderedDict()
        # What packed modules of torch.ao add is unpacked here, and would pile up in a state_dict.
        module._save_to_state_dict(own, _prefix(inner), keep_vars=True)
        yield inner, module, own


def fill_modules(
    file: CompressedFile, model: nn.Module, path: str = "", but: Container[nn.Module] = ()
) -> None:
    """Load what a file holds into every module; what lies on the meta device gets memory.

    Args:
        file: checked to fit, see `check_fits`.
        model: changed in place.
        path: of `model` in what the file holds.
        but: modules that are left as they are.

    Raises:
        RuntimeError: a module does not take its state.
    """
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        if module not in but:
            _give_memory(module, moved)
    for inner, module, own in own_states(model, path):
        if module in but:
            continue
        state = {name: read_entry(file, name, target) for name, target in own.items()}
        metadata = {"version": module._version}
        errors: list[str] = []
        module._load_from_state_dict(state, _prefix(inner), metadata, True, errors, errors, errors)
        if errors:
            raise RuntimeError(f"{inner}: {'; '.join(errors)}")


def _give_memory(module: nn.Module, moved: dict[Tensor, Tensor]) -> None:
    """Put memory in the places of a module's tensors on the meta device; ties stay ties.

    Args:
        module: changed in place.
        moved: tensor on the meta device -> what has taken its place.
    """
    for held in (module._parameters, module._buffers):
        places: dict[str, Any] = held
        for name, tensor in list(held.items()):
            if tensor is None or not tensor.is_meta or name in module._non_persistent_buffers_set:
                continue
            if tensor not in moved:
                memory = empty(tensor.shape, tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                moved[tensor] = (
                    nn.Parameter(memory, tensor.requires_grad) if is_parameter else memory
                )
            places[name] = moved[tensor]


def _prefix(path: str) -> str:
    return f"{path}." if path else ""
