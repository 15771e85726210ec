"""Loading a compressed file straight into modules that compute with compressed weights."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.kernels import PACKINGS, SparseLinear
from fx_sparsity.kernels.embedding import RowPrunedEmbedding, RowPrunedEmbeddingBag
from fx_sparsity.storage.compressed_file import CompressedFile
from fx_sparsity.storage.loading import check_fits, check_sums

_PACKINGS = {"bitmask": "bitmask", "two_four": "nm", "block": "block"}
"""Format of a matrix in a file -> packing of the kernels, where there is such a one."""


@torch.no_grad()
def load_sparse(path: str | Path, model: nn.Module, *, check: bool = False) -> dict[str, str]:
    """Load what `save` wrote, keeping sparse weights compressed: their modules are replaced.

    A linear layer whose weight is stored sparse becomes a `SparseLinear`, an embedding or bag with
    pruned rows a `RowPrunedEmbedding` or `RowPrunedEmbeddingBag`; these are for inference. Of
    these weights one at a time is dense in memory, where the model's parameters are on the meta
    device (`parameters_on_meta`). Whether compressed weights are faster is not asked here.

    Args:
        path: of the file.
        model: changed in place.
        check: compare every tensor with its checksum, too.

    Returns:
        For each matrix that is stored sparse: its name -> what holds it now, or `dense: ` and why.

    Raises:
        FileFormatError: the file contradicts itself; the model is as it was.
        RuntimeError: the file does not fit the model, which is as it was.
        TypeError: the file is of a quantized model, whose codes are no plain tensors.
    """
    file = CompressedFile(path)
    if check:
        check_sums(file)
    for name in file.described:
        raise TypeError(f"{name}: no plain tensor; `load` the file, and lower the model")
    targets = model.state_dict(keep_vars=True)
    check_fits(file, targets)
    report: dict[str, str] = {}
    made: dict[str, nn.Module] = {}
    uses = Counter(id(target) for target in targets.values())
    for name in file.forms.keys() & targets.keys() - file.described.keys():
        if file.forms[name] == "dense" or targets[name].ndim != 2:
            continue
        prefix, _, attribute = name.rpartition(".")
        owner = model.get_submodule(prefix)
        why = _obstacle(owner, attribute, prefix)
        if uses[id(targets[name])] > 1:
            why = "tied to another weight"
        elif targets[name].dtype != file.dtype_and_shape(name)[0]:
            why = f"stored in {file.dtype_and_shape(name)[0]}, in the model {targets[name].dtype}"
        if not why:
            bias = file.read(f"{prefix}.bias") if f"{prefix}.bias" in file.forms else None
            built = _build(owner, file.forms[name], file.tensor(name), bias)
            if isinstance(built, nn.Module):
                made[prefix] = built.train(owner.training)
                report[name] = type(built).__name__
                continue
            why = built
        report[name] = f"dense: {why}"
    inside = tuple(f"{prefix}." for prefix in made)
    _fill(model, file, [name for name in file.keys if not name.startswith(inside)], targets)
    for prefix, module in made.items():
        model.set_submodule(prefix, module)
    return {name: report[name] for name in file.forms if name in report}


def _obstacle(owner: nn.Module, attribute: str, prefix: str) -> str:
    """Why a module cannot be replaced, or nothing."""
    if type(owner) not in (nn.Linear, nn.Embedding, nn.EmbeddingBag) or attribute != "weight":
        return f"held by a {type(owner).__name__}"
    if not prefix:
        return "the model itself"
    if owner._forward_hooks or owner._forward_pre_hooks:
        return "its module has hooks"
    return ""


def _build(owner: nn.Module, form: str, weight: Tensor, bias: Tensor | None) -> nn.Module | str:
    """The module that takes the place of `owner`, or why there is none."""
    if isinstance(owner, nn.Linear):
        packing = _PACKINGS.get(form, "bitmask")
        packing = packing if packing in PACKINGS else "bitmask"
        why = PACKINGS[packing].refusal(weight)
        return why or SparseLinear.from_dense(weight, bias, packing=packing)
    if form != "rows":
        return f"an embedding in the format {form}"
    if owner.max_norm is not None:
        return "an embedding with max_norm"
    if isinstance(owner, nn.Embedding):
        built = RowPrunedEmbedding.from_dense(weight)
        built.padding_idx = owner.padding_idx
        return built
    assert isinstance(owner, nn.EmbeddingBag)
    return RowPrunedEmbeddingBag.from_dense(
        weight,
        mode=owner.mode,
        padding_idx=owner.padding_idx,
        include_last_offset=owner.include_last_offset,
    )


def _fill(
    model: nn.Module, file: CompressedFile, names: list[str], targets: dict[str, Tensor]
) -> None:
    """Load the entries that stay as they are; parameters on the meta device get memory."""
    filled: dict[int, nn.Parameter | Tensor] = {}
    for name in names:
        target = targets[name]
        if not target.is_meta:
            file.fill(name, target)
            continue
        prefix, _, attribute = name.rpartition(".")
        owner = model.get_submodule(prefix)
        if id(target) not in filled:
            tensor = file.read(name).to(target.dtype)
            is_parameter = isinstance(target, nn.Parameter)
            filled[id(target)] = (
                nn.Parameter(tensor, target.requires_grad) if is_parameter else tensor
            )
        held: dict[str, Any] = owner._parameters
        held = held if attribute in held else owner._buffers
        held[attribute] = filled[id(target)]
