"""Weights that pruning has rounded, handed on to torchao as the codes and scales that they are."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fx_sparsity.quantization.backend import BackendError, check_unmasked, copied, get_backend
from fx_sparsity.quantization.grid import GRID, Grid
from fx_sparsity.sparsifier import BaseSparsifier, SparsityRecord
from fx_sparsity.verification.gate import Verification, verify


class RoundedModel(NamedTuple):
    """What `quantize_rounded` returns.

    Attributes:
        model: with torchao's tensors in the place of rounded weights.
        verification: of every masked weight.
        in_float: FQN -> the reason why a masked weight is still in float.
    """

    model: nn.Module
    verification: Verification
    in_float: Mapping[str, str]


def quantize_rounded(model: nn.Module, sparsifier: BaseSparsifier) -> RoundedModel:
    """Put torchao's tensors in the place of weights that `Rounding` has rounded, in a copy.

    Nothing is rounded again: codes and scales are those that pruning found, and each tensor
    dequantizes to the weight as it is, bit for bit. Codes of 8 bits with one scale an output become
    an `Int8Tensor`, which `lower` knows; others an `IntxUnpackedToInt8Tensor`. Both quantize
    weights only, and are what `Int8WeightOnlyConfig` and `IntxWeightOnlyConfig` give. A tied
    weight stays tied.

    Args:
        model: pruned by `sparsifier`, squashed, in float32, bfloat16 or float16. Not changed.
        sparsifier: that pruned it with `Rounding` as its last step, bound to it. Its state has the
            scales.

    Returns:
        The quantized model, the verification, and what is left in float: whatever is not the weight
        of an `nn.Linear`, was not rounded, is no longer what it was rounded to, or has a row that
        groups do not divide.

    Raises:
        BackendError: torchao is not installed; live masks; the sparsifier is not bound to the
            model; or none of its weights was rounded.
        RuntimeError: the model cannot be copied.

    Examples:
        >>> from fx_sparsity.pruning.methods import Rounding
        >>> from fx_sparsity.quantization import quantize_rounded
        >>> model = nn.Sequential(nn.Linear(64, 16))
        >>> method = fxs.Pipeline(fxs.SparseGPTSparsifier(), Rounding(bits=4, group_size=32))
        >>> model, _ = fxs.prune(model, method, [(torch.randn(128, 64),)], "2:4")
        >>> model, _ = fxs.squash(model, method)
        >>> rounded = quantize_rounded(model, method)
        >>> [(row.fqn, row.dtype, row.zeros >= 512) for row in rounded.verification.raise_if_lost()]
        [('0.weight', 'int4', True)]
    """
    get_backend("torchao")
    _check(model, sparsifier)
    record = SparsityRecord.of(sparsifier)
    quantized = copied(model, training=None)
    places = _places(quantized)
    found: dict[str, Tensor] = {}
    in_float: dict[str, str] = {}
    for fqn in sparsifier.names:
        made = _tensor(places.get(fqn, ()), sparsifier.state[fqn].get(GRID))
        if isinstance(made, str):
            in_float[fqn] = made
        else:
            found[fqn] = made
    for fqn, tensor in found.items():
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, _ in places[fqn]:
            module.weight = parameter
    return RoundedModel(quantized, verify(quantized, record, meant=found), in_float)


def _check(model: nn.Module, sparsifier: BaseSparsifier) -> None:
    """Raise `BackendError` where there is nothing to hand on, or not yet."""
    check_unmasked(model)
    if sparsifier.model is not model:
        raise BackendError(
            f"the sparsifier is not bound to this {type(model).__name__}; give the model that it "
            "pruned, or attach it"
        )
    if not any(GRID in sparsifier.state[fqn] for fqn in sparsifier.names):
        raise BackendError(
            f"none of {', '.join(sparsifier.names) or 'its weights'} was rounded; prune with a "
            "Pipeline that ends in Rounding"
        )


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """FQN -> every module that holds the parameter, and as which attribute."""
    names: dict[str, Tensor] = {}
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            names[f"{prefix}.{attribute}".removeprefix(".")] = parameter
            held.setdefault(id(parameter), []).append((module, attribute))
    return {name: held[id(parameter)] for name, parameter in names.items()}


def _tensor(places: Sequence[tuple[nn.Module, str]], kept: dict[str, Any] | None) -> Tensor | str:
    """What torchao makes of a weight, or why nothing.

    Args:
        places: that hold it.
        kept: what the sparsifier's state has of its grid.
    """
    from fx_sparsity.quantization.torchao_codes import tensor_of_codes

    if not places:
        return "no parameter of the model has its name"
    for module, attribute in places:
        if not isinstance(module, nn.Linear) or attribute != "weight":
            return (
                f"torchao has linear layers alone, and it is the {attribute} of a {_name(module)}"
            )
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return f"a {_name(module)} says that it cannot be quantized"
    if kept is None:
        return "was not rounded"
    grid, scales = Grid.from_state(kept)
    module, attribute = places[0]
    weight = module._parameters[attribute]
    assert weight is not None
    width = weight.shape[1]
    if width % grid.size(width):
        return f"groups of {grid.size(width)} do not divide its {width} inputs, as torchao needs"
    if tuple(scales.shape) != (1, len(weight), width // grid.size(width)):
        return "it was pruned as another product than that of a linear layer"
    scales = scales[0].to(weight.device)
    codes = grid.codes(weight.detach(), scales)
    if codes is None:
        return "its values are no longer those that it was rounded to; prune it once more"
    return tensor_of_codes(codes, scales, grid, weight.dtype)


def _name(module: nn.Module) -> str:
    return type(module).__name__
