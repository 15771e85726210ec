"""Plain states into masked modules: what is loaded for a weight goes beneath its mask."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fx_sparsity.sparsifier.mask import Mask


def take_plain_keys(module: nn.Module) -> None:
    """Let a masked module load the keys that it had before, too.

    Without `strict` they would be passed over without a word.
    """
    if not any(_is_ours(hook) for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(_load_beneath)


def refuse_plain_keys(module: nn.Module) -> None:
    """Undo `take_plain_keys`, once nothing of the module is masked any more."""
    if any(isinstance(child, Mask) for child in module.modules()):
        return
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
        del hooks[key]


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", hook) is _load_beneath


def _load_beneath(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any
) -> None:
    """Rename plain keys to those of the originals; masks that the state lacks stay as they are."""
    if not parametrize.is_parametrized(module):
        return
    entries: Any = module.parametrizations
    for attribute, entry in entries.items():
        key = f"{prefix}parametrizations.{attribute}"
        plain = f"{prefix}{attribute}"
        if isinstance(entry[0], Mask) and len(entry) == 1 and plain in state_dict:
            state_dict.setdefault(f"{key}.original", state_dict.pop(plain))
            state_dict.setdefault(f"{key}.0.mask", entry[0].mask)
