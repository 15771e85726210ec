"""Plain checkpoints for a model whose masks are still on."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fx_sparsity.sparsifier.mask import GRAPH_MASKS, Mask


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state that the squashed model would have: plain keys, zeros in place, no masks.

    The model keeps its masks.
    """
    masked = _masked(model)
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key in masked:
            plain, mask = masked[key]
            state[plain] = mask(value).detach()
        elif not _belongs_to_mask(key, masked):
            state[key] = value
    return state


def original_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state to go on training with: plain keys, the values beneath the masks, and the masks.

    Loaded into the masked model, everything is as it was; a model without masks finds dense
    weights, and passes over the masks, without `strict`. The mask of a tied weight is there once.
    """
    masked = _masked(model)
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in model.state_dict().items():
        if _belongs_to_mask(key, masked):
            if value.data_ptr() in seen:
                continue
            seen.add(value.data_ptr())
        state[masked[key][0] if key in masked else key] = value
    return state


def load_dense_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
) -> Any:
    """Load a plain checkpoint beneath the masks of a prepared model; the masks stay as they are.

    Args:
        model: with or without masks.
        state: keys as the model had them before `prepare`. Not changed.
        strict: as for `nn.Module.load_state_dict`.

    Returns:
        The missing and unexpected keys, as `nn.Module.load_state_dict` does.

    Raises:
        RuntimeError: a missing or unexpected key, with `strict`.
    """
    masked = _masked(model)
    plain = {name: key for key, (name, _) in masked.items()}
    translated = {plain.get(name, name): value for name, value in state.items()}
    for key, value in model.state_dict().items():
        if _belongs_to_mask(key, masked):
            translated[key] = value
    return model.load_state_dict(translated, strict=strict)


def _masked(model: nn.Module) -> dict[str, tuple[str, Mask]]:
    """Key of an original -> (plain key, mask), for every tensor that a mask alone parametrizes."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, Mask) and name.startswith(f"{GRAPH_MASKS}."):
            plain = name.removeprefix(f"{GRAPH_MASKS}.")
            found[plain] = (plain, module)
        if not parametrize.is_parametrized(module):
            continue
        for attribute, entry in module.parametrizations.items():
            if len(entry) == 1 and isinstance(entry[0], Mask):
                key = f"{prefix}parametrizations.{attribute}.original"
                found[key] = (f"{prefix}{attribute}", entry[0])
    return found


def _belongs_to_mask(key: str, masked: Mapping[str, Any]) -> bool:
    head, _, tail = key.rpartition(".")
    in_graph = key.startswith(f"{GRAPH_MASKS}.")
    return tail == "mask" and (in_graph or f"{head.removesuffix('.0')}.original" in masked)
