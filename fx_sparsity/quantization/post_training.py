"""Sparse and quantized embeddings in one call, for models whose tables are most of their bytes."""

import copy
from collections.abc import Sequence
from typing import Any

import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from fx_sparsity.quantization.backend import BackendError
from fx_sparsity.quantization.eager import embedding_qconfig, read_quantized
from fx_sparsity.quantization.embeddings import (
    Embedding,
    bake_max_norm,
    check_quantizable,
    match_float_forward,
)
from fx_sparsity.sparsifier import BaseDataSparsifier, module_to_fqn


def post_training_sparse_quantize(
    model: nn.Module,
    data_sparsifier_class: type[BaseDataSparsifier],
    sparsify_first: bool = True,
    select_embeddings: Sequence[Embedding] | None = None,
    **sparse_config: Any,
) -> nn.Module:
    """Sparsify and quantize the embeddings and embedding bags of a model, in place.

    A masked value's code afterwards means exactly zero, in both orders. `padding_idx`, `max_norm`,
    the mode of a bag and `per_sample_weights` work as they did.

    Args:
        model: changed in place: quantized modules take the places of its embeddings.
        data_sparsifier_class: how to sparsify, such as `DataNormSparsifier`.
        sparsify_first: mask the float tables and quantize them; False quantizes, then masks codes.
        select_embeddings: which modules of the model; all by default.
        sparse_config: arguments of the sparsifier's constructor.

    Returns:
        `model`; or, where the model itself is an embedding, the quantized module.

    Raises:
        TypeError: a selected module is no embedding.
        ValueError: a selected module is not part of the model.
        BackendError: an embedding bag that takes the maximum, or a subclass with a forward of its
            own.

        Whatever is raised, the model was not changed.
    """
    embeddings = _select(model, select_embeddings)
    for name, module in embeddings.items():
        check_quantizable(name, module)
        if type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
            raise BackendError(
                f"{name}: expected torch's own forward, found {type(module).__name__}.forward, "
                "which a quantized module would lose; leave it out with select_embeddings, or "
                "quantize the model with backend 'pt2e'"
            )
    sparsifier = data_sparsifier_class(**sparse_config)
    quantized = {}
    if sparsify_first:
        for name, module in embeddings.items():
            sparsifier.add_data(name, _table(module))
        sparsifier.step()
        for name, module in embeddings.items():
            weight = sparsifier.get_data(name, return_original=False)
            quantized[name] = _quantized_embedding(module, weight)
    else:
        stored = {}
        for name, module in embeddings.items():
            quantized[name] = _quantized_embedding(module, _table(module))
            stored[name] = read_quantized(name, quantized[name])
            sparsifier.add_data(name, stored[name].dequantize())
        sparsifier.step()
        for name, codes in stored.items():
            codes.set_zero(sparsifier.get_mask(name).bool())
    for name, module in embeddings.items():
        for parent in list(model.modules()):
            for attribute, child in list(parent._modules.items()):
                if child is module:
                    setattr(parent, attribute, quantized[name])
    return quantized.get("", model)


def _select(model: nn.Module, chosen: Sequence[Embedding] | None) -> dict[str, Embedding]:
    """FQN -> embedding, each module once."""
    if chosen is None:
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
    selected: dict[str, Embedding] = {}
    for module in chosen:
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise TypeError(
                "select_embeddings: expected embeddings and embedding bags, "
                f"found {type(module).__name__}"
            )
        name = module_to_fqn(model, module)
        if name is None:
            raise ValueError(f"select_embeddings: {module} is not part of the model")
        selected[name] = module
    return selected


def _quantized_embedding(module: Embedding, weight: Tensor) -> nn.Module:
    """Torch's quantized module for an embedding, holding `weight` instead of its own."""
    rows, dim = weight.shape
    source: Embedding
    if isinstance(module, nn.EmbeddingBag):
        source = nn.EmbeddingBag(
            rows, dim, include_last_offset=module.include_last_offset, _weight=weight
        )
    else:
        source = nn.Embedding(rows, dim, _weight=weight)
    source.qconfig = embedding_qconfig  # type: ignore[assignment]
    kind = nnq.EmbeddingBag if isinstance(module, nn.EmbeddingBag) else nnq.Embedding
    quantized = kind.from_float(source)
    match_float_forward(quantized, module)
    return quantized


def _table(module: Embedding) -> Tensor:
    """A copy of the weight as lookups see it."""
    copied = copy.deepcopy(module)
    bake_max_norm(copied)
    return copied.weight.detach()
