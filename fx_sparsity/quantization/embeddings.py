"""Makes torch's quantized embedding modules compute what the float modules did.

`nnq.EmbeddingBag` sums whatever the mode says and counts padding; both modules forget `max_norm`
and refuse expanded indices.
"""

from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from fx_sparsity.quantization.backend import BackendError

Embedding = nn.Embedding | nn.EmbeddingBag


def check_quantizable(name: str, module: Embedding) -> None:
    """Raise if the quantized module could not compute the same.

    Raises:
        BackendError: a bag that takes the maximum.
    """
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        raise BackendError(
            f"{name}: expected an EmbeddingBag of mode 'sum' or 'mean', found 'max', which torch's "
            "quantized module cannot compute; exclude it, or quantize with backend 'pt2e'"
        )


@torch.no_grad()
def bake_max_norm(module: Embedding) -> None:
    """Rescale, in place, the rows that a lookup would rescale: beyond `max_norm`."""
    if module.max_norm is not None:
        module.weight.data.renorm_(module.norm_type, 0, module.max_norm)


def match_float_forward(quantized: nn.Module, source: Embedding) -> None:
    """Hook a quantized embedding so that its forward agrees with that of `source`."""
    quantized.padding_idx = source.padding_idx  # type: ignore[assignment]
    quantized.max_norm = source.max_norm  # type: ignore[assignment]
    if isinstance(quantized, nnq.EmbeddingBag):
        quantized.mode = source.mode  # type: ignore[assignment]
        quantized.register_forward_pre_hook(_flatten_bags, with_kwargs=True)
        quantized.register_forward_hook(_reduce_bags, with_kwargs=True)
    else:
        quantized.register_forward_pre_hook(_contiguous_indices)


def _contiguous_indices(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An expanded index, such as BERT's token types, is copied."""
    return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)


def _flatten_bags(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bags of rows become flat indices with offsets; padding gets a weight of zero."""
    call = dict(zip(("indices", "offsets", "per_sample_weights"), args, strict=False)) | kwargs
    call["indices"] = call.pop("input", call.get("indices"))
    indices: Tensor = call["indices"].contiguous()
    if indices.ndim == 2:
        bags, size = indices.shape
        stop = bags + 1 if module.include_last_offset else bags
        call["offsets"] = torch.arange(stop, device=indices.device, dtype=indices.dtype) * size
    weights = call.get("per_sample_weights")
    weights = None if weights is None else weights.reshape(-1).contiguous()
    if module.padding_idx is not None:
        counted = (indices.reshape(-1) != module.padding_idx).float()
        weights = counted if weights is None else weights * counted
    call["per_sample_weights"] = weights
    call["indices"] = indices.reshape(-1)
    return (), call


def _reduce_bags(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
    """Divide sums by what each bag counts, where the mode is the mean."""
    del args
    if module.mode != "mean":
        return output
    indices, offsets = kwargs["indices"], kwargs["offsets"]
    ends = (
        offsets[1:]
        if module.include_last_offset
        else torch.cat([offsets[1:], offsets.new_tensor([len(indices)])])
    )
    starts = offsets[: len(ends)]
    bag = torch.repeat_interleave(ends - starts)
    counted = (
        torch.ones(len(indices))
        if module.padding_idx is None
        else ((indices != module.padding_idx).float())
    )
    counts = torch.zeros(len(ends)).index_add_(0, bag, counted[: len(bag)])
    return output / counts.clamp(min=1).unsqueeze(1)
