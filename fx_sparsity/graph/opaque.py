"""Inputs and outputs that are no pytrees, such as the caches of language models.

`torch.export` takes and returns pytrees of tensors and constants. An object of any other class
counts here as the tensors that it holds, so that it never costs a model its graph.
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_CONSTANTS = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_opaque(leaf: object) -> bool:
    """Whether a leaf of a pytree is an object that may hold tensors."""
    return not isinstance(leaf, (Tensor, *_SYMBOLS, *_CONSTANTS))


def expanded(value: Any) -> Any:
    """A pytree with each opaque object replaced by a tuple of the tensors that it holds."""
    return pytree.tree_map(lambda leaf: _tensors(leaf) if is_opaque(leaf) else leaf, value)


def copied(value: Any) -> Any:
    """A pytree whose opaque objects are copies, since a call may change them."""

    def copy_of(leaf: Any) -> Any:
        return (
            _with(leaf, [t.detach().clone() for t in _tensors(leaf)]) if is_opaque(leaf) else leaf
        )

    return pytree.tree_map(copy_of, value)


@contextmanager
def exportable(model: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Let a model take and return pytrees.

    Args:
        model: its `forward` is another one meanwhile.
        args: as the model takes them.
        kwargs: as the model takes them.

    Yields:
        Positional and keyword arguments for it now, see `expanded`.
    """
    forward, own = model.forward, vars(model).get("forward")

    @functools.wraps(forward)
    def on_pytrees(*given: Any, **named: Any) -> Any:
        given = tuple(map(_restored, args, given))
        named = {key: _restored(kwargs[key], value) for key, value in named.items()}
        return expanded(forward(*given, **named))

    model.forward = on_pytrees
    try:
        yield expanded(args), expanded(kwargs)
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _restored(original: Any, value: Any) -> Any:
    """Undo `expanded`: objects like those in `original`, with the tensors of `value`."""
    leaves, spec = pytree.tree_flatten(original)
    given = iter(pytree.tree_leaves(value))
    found = [
        _with(leaf, [next(given) for _ in _tensors(leaf)]) if is_opaque(leaf) else next(given)
        for leaf in leaves
    ]
    return pytree.tree_unflatten(found, spec)


def _with(leaf: Any, tensors: Iterable[Tensor]) -> Any:
    """A copy of an object with other tensors; modules and classes that it refers to are shared."""
    seen: dict[int, Any] = {}
    memo = {id(old): new for old, new in zip(_walk(leaf, seen), tensors, strict=True)}
    shared = {key: value for key, value in seen.items() if isinstance(value, nn.Module)}
    return copy.deepcopy(leaf, {**shared, **memo})


def _tensors(leaf: Any) -> tuple[Tensor, ...]:
    """The tensors that an object holds, each once."""
    return tuple(_walk(leaf, {}))


def _walk(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    """Tensors in an object's attributes and containers; `seen` takes what was passed."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        items = value
    elif not isinstance(value, nn.Module | type) and hasattr(value, "__dict__"):
        items = vars(value).values()
    for item in list(items):
        yield from _walk(item, seen)
