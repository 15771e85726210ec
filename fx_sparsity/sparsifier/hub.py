"""What a `transformers` model may not do, or need not do, while its masks are on."""

from typing import Any

from torch import nn

_GUARDED = ("save_pretrained", "tie_weights")


def guard(model: nn.Module) -> None:
    """Put guards on every module that saves itself to a hub's format.

    `save_pretrained` would write the parametrizations' keys, which nothing could load: it raises
    and says what to do. `tie_weights` looks for parameters that are beneath masks now; ties hold
    anyway, since a tied weight has one mask on every alias, so it does nothing.
    """
    for module in model.modules():
        if all(callable(getattr(module, name, None)) for name in _GUARDED):
            object.__setattr__(module, "save_pretrained", _refuse_to_save)
            object.__setattr__(module, "tie_weights", _keep_ties)


def unguard(model: nn.Module) -> None:
    """Take the guards off again."""
    for module in model.modules():
        for name in _GUARDED:
            module.__dict__.pop(name, None)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "save_pretrained: the model's masks are still on, and their keys would not load anywhere; "
        "call squash(model, sparsifier) first, or pass state_dict=dense_state_dict(model) to "
        "type(model).save_pretrained(model, ...)"
    )


def _keep_ties(*args: Any, **kwargs: Any) -> None:
    del args, kwargs
