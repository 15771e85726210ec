"""Quantized embeddings that compute what the float ones did.

Torch's quantized modules do it for plain tables once helped: `nnq.EmbeddingBag` sums whatever the
mode says and counts padding; both modules forget `max_norm` and refuse expanded indices. Whatever
they have no room for, such as a forward of a subclass or the maximum of a bag, keeps its module,
which then reads its weight from codes.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.ao.quantization import QConfig
from torch.ao.quantization.observer import PerChannelMinMaxObserver, PlaceholderObserver
from torch.nn.utils import parametrize

from fx_sparsity.quantization.backend import BackendError
from fx_sparsity.quantization.codes import CodedWeight, Codes, hold_codes
from fx_sparsity.quantization.observers import EMBEDDING_SPEC, FarRowsAlone, IntegerZeroPoint
from fx_sparsity.sparsifier import Mask

Embedding = nn.Embedding | nn.EmbeddingBag


class EmbeddingObserver(IntegerZeroPoint, PerChannelMinMaxObserver):  # type: ignore[misc]
    """Observes embedding rows so that zero is a code."""


class FarRowsAloneObserver(FarRowsAlone, PerChannelMinMaxObserver):  # type: ignore[misc]
    """Observes embedding rows so that zero is a code in those that span it."""


embedding_qconfig = QConfig(
    activation=PlaceholderObserver.with_args(dtype=torch.float),
    weight=EmbeddingObserver.with_args(dtype=torch.quint8, **EMBEDDING_SPEC),
)
"""Weight-only 8-bit embeddings; `float_qparams_weight_only_qconfig` with a zero that is a code."""

far_rows_alone_qconfig = embedding_qconfig._replace(
    weight=FarRowsAloneObserver.with_args(dtype=torch.quint8, **EMBEDDING_SPEC)
)
"""The same, but rows whose values are all of one sign are quantized as torch does."""


def is_float_embedding(module: nn.Module) -> TypeGuard[Embedding]:
    """Whether a module is an embedding or an embedding bag that is not quantized yet."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and not isinstance(
        module, CodedWeight
    )


def check_quantizable(name: str, module: Embedding, qconfig: QConfig | None = None) -> None:
    """Raise if the weight is not the module's own to replace, or torch packs it wrongly.

    Raises:
        BackendError: it is masked, a hook computes it, it is on the meta device, or its rows are
            to be of an odd number of 4-bit codes.
    """
    four_bits = qconfig is not None and qconfig.weight().dtype == torch.quint4x2
    if four_bits and module.embedding_dim % 2:
        raise BackendError(
            f"{name}: torch packs rows of {module.embedding_dim} 4-bit codes wrongly, across "
            "bytes; quantize it to 8 bits"
        )
    if parametrize.is_parametrized(module, "weight"):
        entry: Any = module.parametrizations
        if any(isinstance(step, Mask) for step in entry["weight"]):
            raise BackendError(f"{name}: its weight is still masked; squash before quantizing")
    elif "weight" not in module._parameters and "weight" not in module._buffers:
        raise BackendError(
            f"{name}: expected a weight that the module holds, found one that a hook or a property "
            "computes; bake it in first, as torch.nn.utils.prune.remove does, or leave it out"
        )
    if module.weight.is_meta:
        raise BackendError(
            f"{name}: its weight has no data yet, it is on the meta device; load the model first"
        )


@torch.no_grad()
def float_table(module: Embedding) -> Tensor:
    """A copy of the weight as lookups see it: rows beyond `max_norm` rescaled."""
    weight = module.weight.detach().clone()
    if module.max_norm is not None:
        weight.renorm_(module.norm_type, 0, module.max_norm)
    return weight


def quantize_table(
    name: str, module: Embedding, weight: Tensor, qconfig: QConfig
) -> nnq.Embedding | Codes:
    """Quantize `weight`, [rows, dim], the table of `module`, which is not changed.

    Returns:
        Torch's quantized module where it can stand in for `module`, otherwise codes for it to
        hold; see `replace_embeddings`.

    Raises:
        BackendError: torch's module cannot stand in, and the codes are not of 8 bits.
    """
    rows, dim = weight.shape
    table = weight.detach().float().cpu()
    source: Embedding
    if isinstance(module, nn.EmbeddingBag):
        source = nn.EmbeddingBag(
            rows, dim, include_last_offset=module.include_last_offset, _weight=table
        )
    else:
        source = nn.Embedding(rows, dim, _weight=table)
    source.qconfig = qconfig  # type: ignore[assignment]
    kind = nnq.EmbeddingBag if isinstance(module, nn.EmbeddingBag) else nnq.Embedding
    quantized = kind.from_float(source)
    # Torch's class method forgets it for 4-bit lookups, which then read two codes as one.
    quantized.dtype = quantized._packed_params.dtype = quantized.weight().dtype
    if _torch_stands_in(module):
        match_float_forward(quantized, module)
        return quantized
    rebuilt = quantized.weight()
    if rebuilt.dtype != torch.quint8:
        raise BackendError(
            f"{name}: expected a qconfig of torch.quint8 for {type(module).__name__}, "
            f"found {rebuilt.dtype}"
        )
    return Codes(rebuilt, like=weight)


def _torch_stands_in(module: Embedding) -> bool:
    """Whether torch's quantized module does all that `module` does: a float32 lookup on the CPU."""
    kind = nn.EmbeddingBag if isinstance(module, nn.EmbeddingBag) else nn.Embedding
    plain = kind(1, 1, _weight=torch.empty(1, 1))
    additions = {name for name in dir(module) if not name.startswith("_")} - set(dir(plain))
    held = {*module._parameters, *module._buffers, *module._modules}
    hooks = (module._forward_pre_hooks, module._forward_hooks)
    return (
        getattr(module.forward, "__func__", None) is kind.forward
        and not additions
        and held == {"weight"}
        and not any(hooks)
        and getattr(module, "mode", None) != "max"
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    )


def replace_embeddings(
    model: nn.Module, quantized: Mapping[Embedding, nnq.Embedding | Codes]
) -> nn.Module:
    """Put what `quantize_table` made in the places of embeddings, wherever the model has them.

    Returns:
        `model`, or what replaces it where it is an embedding itself.
    """
    standing_in: dict[nn.Module, nn.Module] = {}
    for module, made in quantized.items():
        if isinstance(made, Codes):
            hold_codes(module, made)
        else:
            standing_in[module] = made
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child in standing_in:
                setattr(parent, attribute, standing_in[child])
    return standing_in.get(model, model)


def convert_tables(model: nn.Module, qconfigs: Mapping[str, QConfig]) -> nn.Module:
    """Quantize embeddings by their weights, in place.

    Args:
        model: that holds them.
        qconfigs: name of an embedding -> how to quantize it.

    Returns:
        `model`, or what replaces it where it is an embedding itself.
    """
    tables = {}
    for name, qconfig in qconfigs.items():
        module = model.get_submodule(name)
        assert is_float_embedding(module)
        module.__dict__.pop("qconfig", None)  # what a quantizer's prepare left on it
        tables[module] = quantize_table(name, module, float_table(module), qconfig)
    return replace_embeddings(model, tables)


def match_float_forward(quantized: nn.Module, source: Embedding) -> None:
    """Hook a quantized embedding so that its forward agrees with that of `source`."""
    quantized.padding_idx = source.padding_idx  # type: ignore[assignment]
    quantized.max_norm = source.max_norm  # type: ignore[assignment]
    if isinstance(quantized, nnq.EmbeddingBag):
        quantized.mode = source.mode  # type: ignore[assignment]
        quantized.register_forward_pre_hook(_flatten_bags, with_kwargs=True)
        quantized.register_forward_hook(_reduce_bags, with_kwargs=True)
    else:
        quantized.register_forward_pre_hook(_contiguous_indices, with_kwargs=True)


def _contiguous_indices(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An expanded index, such as BERT's token types, is copied.

    The float module calls it `input`, as torchrec does, and the quantized one `indices`.
    """
    del module
    given = (*args, kwargs.pop("input")) if "input" in kwargs else args
    return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in given), kwargs


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


FORWARD_HOOKS = (_contiguous_indices, _flatten_bags, _reduce_bags)
"""What `match_float_forward` puts on modules."""
