"""Padding is not data: which tokens of a batch count, and their activations at a weight.

A tokenizer's batch says by name which of its tokens are padding: `attention_mask`, and
`decoder_attention_mask` for the decoder's side of a model that has both. What does not count is
taken out of the arguments of each operator before statistics see them, so that tokens are counted,
squared and summed as if the sequences had come one by one.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.graph.example_inputs import ExampleInputs, InputError, call_arguments
from fx_sparsity.graph.operators import Operator

ENCODER, DECODER = "attention_mask", "decoder_attention_mask"
_INDICES = ("embedding",)
"""Kinds of operators whose tokens are those of `indices`."""


@dataclass(frozen=True)
class Padding:
    """Which tokens of one batch count.

    Attributes:
        keep: boolean, [batch, tokens], by the name of the mask that says so.
        reason: why a mask of the batch says nothing here; empty where none is passed over.
    """

    keep: Mapping[str, Tensor]
    reason: str = ""

    def find(self, shape: torch.Size, decoder: bool) -> Tensor | None:
        """What counts of a tensor's leading axes, in their shape; None where they are no tokens.

        Args:
            shape: of activations or indices: [batch, tokens, ...], [tokens, batch, ...] or
                [batch * tokens, ...]; axes of one element may stand before and between.
            decoder: whether the tensor depends on what the decoder is given.
        """
        names = (DECODER, ENCODER) if decoder else (ENCODER, DECODER)
        for keep in (self.keep[name] for name in names if name in self.keep):
            for form in (keep, keep.t(), keep.reshape(-1)):
                if (leading := _leading(form.shape, shape)) is not None:
                    return form.reshape(leading)
        return None


def read_padding(
    model: nn.Module, inputs: ExampleInputs, token_weights: Tensor | None = None
) -> Padding:
    """Which tokens of a batch count: all of them, unless a mask among its inputs says otherwise.

    Args:
        model: whose `forward` gives positional inputs their names.
        inputs: of the batch.
        token_weights: [batch, tokens], zeros and ones, in the place of the batch's own masks.

    Raises:
        InputError: `token_weights` are not of two dimensions, or other numbers than zeros and ones.
    """
    if token_weights is not None:
        if token_weights.ndim != 2 or not bool(((token_weights == 0) | (token_weights == 1)).all()):
            raise InputError(
                "token_weights: expected zeros and ones of shape [batch, tokens], found "
                f"{token_weights.dtype} of shape {tuple(token_weights.shape)}"
            )
        return _padding({ENCODER: token_weights})
    args, kwargs = call_arguments(inputs)
    given = dict(zip(_positional(model), args, strict=False)) | kwargs
    masks = {
        name: given[name] for name in (ENCODER, DECODER) if isinstance(given.get(name), Tensor)
    }
    wide = [name for name, mask in masks.items() if mask.ndim != 2]
    reason = f"{wide[0]} has {masks[wide[0]].ndim} dimensions: pass token_weights" if wide else ""
    return _padding({name: mask for name, mask in masks.items() if mask.ndim == 2}, reason)


def without_padding(
    padding: Padding, row: Operator, arg: str, args: Mapping[str, Any], decoder: bool = False
) -> tuple[Mapping[str, Any], str]:
    """The arguments of an operator without what belongs to padding; and why they still have it.

    Args:
        padding: of the batch.
        row: of the operator.
        arg: the argument that receives the weight.
        args: by name, with values.
        decoder: whether they depend on what the decoder is given.
    """
    if not padding.keep:
        return args, padding.reason
    if row.linear is not None and arg == row.linear.weight:
        name = row.linear.x
    elif row.kind in _INDICES:
        name = "indices"
    else:
        return args, f"padding counts: a {row.kind} does not show which of its inputs are tokens"
    value = args[name]
    keep = padding.find(value.shape, decoder)
    if keep is None:
        return args, f"padding counts: inputs of shape {tuple(value.shape)} have no axes of tokens"
    return {**args, name: value[keep.to(value.device)]}, padding.reason


def _leading(sizes: torch.Size, shape: torch.Size) -> torch.Size | None:
    """The leading axes of `shape` that have these sizes, and ones among them."""
    left = list(sizes)
    for axis, size in enumerate(shape):
        if left and size == left[0]:
            left.pop(0)
        elif size != 1:
            break
        if not left:
            return shape[: axis + 1]
    return None


def _padding(masks: Mapping[str, Tensor], reason: str = "") -> Padding:
    """Masks that leave nothing out need not be looked at."""
    keep = {name: mask != 0 for name, mask in masks.items()}
    return Padding({} if all(bool(m.all()) for m in keep.values()) else keep, reason)


def _positional(model: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # a forward that Python cannot look into
        return []
