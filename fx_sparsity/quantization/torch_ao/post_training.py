"""Sparse and quantized embeddings in one call, for models whose tables are most of their bytes."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fx_sparsity.quantization.codes import Codes
from fx_sparsity.quantization.torch_ao.embeddings import (
    Embedding,
    check_quantizable,
    embedding_qconfig,
    float_table,
    is_float_embedding,
    quantize_table,
    replace_embeddings,
)
from fx_sparsity.quantization.torch_ao.modules import read_quantized
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

    Torch's quantized modules take the places of plain float32 tables on the CPU. Any other keeps
    its module, its codes in the place of its weight: bags that take the maximum, subclasses with a
    forward, methods or tensors of their own, modules with hooks, other dtypes and devices. Its
    `weight` is the whole table, dequantized anew at each access, a bag's maximum included: simpler
    than gathering rows, and right whatever a forward does with it. No float copy stays, but one is
    made for each call (`torch.compile` makes an embedding's looked-up rows only). A weight that is
    tied to something else stays there as it was, in float.

    Whatever is raised, the model was not changed.

    Args:
        model: changed in place: its embeddings are quantized.
        data_sparsifier_class: how to sparsify, such as `DataNormSparsifier`.
        sparsify_first: mask the float tables and quantize them; False quantizes, then masks codes.
        select_embeddings: which modules of the model; all by default.
        sparse_config: arguments of the sparsifier's constructor.

    Returns:
        `model`; or, where the model itself is an embedding, the quantized module.

    Raises:
        TypeError: a selected module is no embedding, or is quantized already.
        ValueError: a selected module is not part of the model.
        BackendError: the weight of an embedding is masked, computed by a hook, or has no data.

    Examples:
        >>> model = nn.Sequential(nn.EmbeddingBag(10, 4))
        >>> model = fxs.post_training_sparse_quantize(
        ...     model, fxs.DataNormSparsifier, sparsity_level=0.5, sparse_block_shape=(1, 1)
        ... )
        >>> [(row.fqn, row.dtype, row.zeros) for row in fxs.verify(model)]
        [('0.weight', 'quint8', 20)]
    """
    embeddings = _select(model, select_embeddings)
    for name, module in embeddings.items():
        check_quantizable(name, module)
    sparsifier = data_sparsifier_class(**sparse_config)
    tables = {name: float_table(module) for name, module in embeddings.items()}
    if sparsify_first:
        for name, table in tables.items():
            sparsifier.add_data(name, table)
        sparsifier.step()
        tables = {name: sparsifier.get_data(name, return_original=False) for name in tables}
    quantized = {
        name: quantize_table(name, module, tables[name], embedding_qconfig)
        for name, module in embeddings.items()
    }
    if not sparsify_first:
        stored = {
            name: made.stored(name) if isinstance(made, Codes) else read_quantized(name, made)
            for name, made in quantized.items()
        }
        for name, weight in stored.items():
            sparsifier.add_data(name, weight.dequantize())
        sparsifier.step()
        for name, weight in stored.items():
            weight.set_zero(sparsifier.get_mask(name).bool())
    return replace_embeddings(model, {embeddings[name]: made for name, made in quantized.items()})


def _select(model: nn.Module, chosen: Sequence[Embedding] | None) -> dict[str, Embedding]:
    """FQN -> embedding, each module once."""
    if chosen is None:
        return {
            name: module for name, module in model.named_modules() if is_float_embedding(module)
        }
    selected: dict[str, Embedding] = {}
    for module in chosen:
        if not is_float_embedding(module):
            raise TypeError(
                "select_embeddings: expected float embeddings and embedding bags, "
                f"found {type(module).__name__}"
            )
        name = module_to_fqn(model, module)
        if name is None:
            raise ValueError(f"select_embeddings: {module} is not part of the model")
        selected[name] = module
    return selected
