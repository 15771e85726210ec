"""The flows: a model in, a sparse quantized model and the proof out, in either order."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fx_sparsity.graph import (
    Assignment,
    MappingError,
    MappingLike,
    WeightMap,
    find_weights,
    squash,
)
from fx_sparsity.graph.example_inputs import ExampleInputs
from fx_sparsity.graph.prepare_plan import mapping_for
from fx_sparsity.graph.put_masks import group_entry, mask_weights
from fx_sparsity.patterns import SparsityConfig
from fx_sparsity.quantization.backend import (
    Backend,
    BackendError,
    Calibrate,
    Prepared,
    Quantized,
    get_backend,
    run_calibration,
)
from fx_sparsity.sparsifier import BaseSparsifier, MaskError, SparsityRecord
from fx_sparsity.verification.gate import Verification, read_weights, verify
from fx_sparsity.verification.read import by_name
from fx_sparsity.verification.stored import StoredWeight

logger = logging.getLogger("fx_sparsity")

Order = Literal["sparsify_first", "quantize_first", "interleaved", "qat"]
"""When masks come, next to the quantizer's prepare and convert; see `sparsify_and_quantize`."""


def sparsify_and_quantize(
    model: nn.Module,
    sparsifier: BaseSparsifier,
    example_inputs: ExampleInputs,
    *,
    order: Order,
    backend: str | Backend,
    mapping: MappingLike | None = None,
    calibrate: Calibrate | None = None,
    config: Any = None,
    dynamic_shapes: Any = None,
    reference: Quantized | None = None,
) -> tuple[nn.Module, Verification]:
    """Sparsify and quantize a copy of a model, and verify the result.

    | order | |
    | --- | --- |
    | `"sparsify_first"` | masks the float weights and bakes the zeros in, then quantizes |
    | `"quantize_first"` | quantizes, then masks integer codes; scales and zero points stay |
    | `"interleaved"` | prepare, masks, calibrates with masked weights, bakes in, convert |
    | `"qat"` | prepare with fake quantization, live masks, trains, bakes in, convert |

    Args:
        model: in float, in eval mode, without live masks. Not changed.
        sparsifier: a fresh one. It is bound to the sparse float model, to the prepared one, or,
            quantize-first, to the dequantized weights that it ranked (`.model`).
        example_inputs: a tuple of positional, or a dict of keyword arguments.
        order: see above.
        backend: a name in `BACKENDS`, or a `Backend`.
        mapping: which weight gets which pattern and level; None as in `prepare`.
        calibrate: runs the observed model on data; the example inputs by default. In the order
            `"qat"` it is needed, and trains the model that it is given; it may call
            `sparsifier.step()` as it goes.
        config: the backend's own, see its class.
        dynamic_shapes: as `torch.export.export` takes it.
        reference: the model quantized alike without masks, as `Backend.quantize` returns it, where
            it is at hand; made otherwise. After `"qat"` there is nothing alike to compare with.

    Returns:
        The quantized model, and the verification of every masked weight, which holds the `record`
        of the masks, by names in `model`. It does not raise by itself:
        `verification.raise_if_lost()`.

    Raises:
        InputError, CaptureError, MappingError, MaskError: as `prepare`.
        BackendError: unknown or not installed backend, or one that cannot quantize this model, or
            not in this order.
        ZeroNotRepresentableError: quantize-first, and a weight has no code that means zero.
        ValueError: unknown order, or `"qat"` without anything that trains.

    Examples:
        >>> quantized, verification = fxs.sparsify_and_quantize(
        ...     nn.Sequential(nn.Linear(8, 4)),
        ...     fxs.WeightNormSparsifier(),
        ...     (torch.randn(1, 8),),
        ...     order="sparsify_first",
        ...     backend="eager",
        ...     mapping="2:4",
        ... )
        >>> [(row.fqn, row.dtype, row.zeros) for row in verification.raise_if_lost()]
        [('0.weight', 'qint8', 16)]
    """
    if order not in get_args(Order):
        raise ValueError(f"order: expected one of {', '.join(get_args(Order))}, found {order!r}")
    if order == "qat" and calibrate is None:
        raise ValueError("order 'qat': expected `calibrate`, a function that trains the model")
    if sparsifier.names:
        raise MaskError(
            f"the sparsifier already holds {', '.join(sparsifier.names)}; give a fresh one"
        )
    chosen = get_backend(backend) if isinstance(backend, str) else backend
    if order == "interleaved" and not chosen.observes:
        raise BackendError(
            f"backend {chosen.name!r} has nothing to calibrate between its prepare and its "
            "convert; 'sparsify_first' does the same"
        )
    weights = find_weights(model, example_inputs, dynamic_shapes=dynamic_shapes)
    configs = _resolve(sparsifier, mapping, weights)
    options = {"config": config, "dynamic_shapes": dynamic_shapes}

    def quantized(float_model: nn.Module) -> Quantized:
        return chosen.quantize(float_model, example_inputs, weights, calibrate=calibrate, **options)

    def observe(prepared_model: nn.Module) -> None:
        run_calibration(prepared_model, example_inputs, calibrate)

    with _as_it_was_on_failure(sparsifier):
        if order == "qat":
            assert calibrate is not None
            prepared = chosen.prepare(model, example_inputs, weights, qat=True, **options)
            record = _mask_prepared(prepared, sparsifier, weights, configs, calibrate)
            trained = chosen.convert(prepared, example_inputs)
            return trained.model, _told(
                verify(trained.model, record, meant=trained.meant, in_float=trained.in_float)
            )
        alone = quantized(model) if reference is None else reference
        if order == "sparsify_first":
            sparse = mask_weights(copy.deepcopy(model), sparsifier, weights, configs)
            sparsifier.step()
            sparse, record = squash(sparse, sparsifier)
            result = quantized(sparse).model
        elif order == "interleaved":
            prepared = chosen.prepare(model, example_inputs, weights, **options)
            record = _mask_prepared(prepared, sparsifier, weights, configs, observe)
            result = chosen.convert(prepared, example_inputs).model
        else:
            result = copy.deepcopy(alone.model)
            record = sparsify_codes(result, sparsifier, weights, mapping)
        return result, _told(
            verify(
                result,
                record,
                reference=alone.model,
                meant=alone.meant,
                in_float=alone.in_float,
            )
        )


def _told(verification: Verification) -> Verification:
    """Say which masked weights are not quantized, and why: nothing else of the flow would."""
    left: dict[str, list[str]] = {}
    for row in verification:
        if row.left_in_float:
            left.setdefault(row.in_float, []).append(row.fqn)
    for reason, fqns in left.items():
        more = f" and {len(fqns) - 3} others" if len(fqns) > 3 else ""
        logger.warning(
            "%d of %d masked weights stay in float (%s): %s%s",
            len(fqns),
            len(verification),
            reason or "the backend gives no reason",
            ", ".join(fqns[:3]),
            more,
        )
    return verification


def _resolve(
    sparsifier: BaseSparsifier, mapping: MappingLike | None, weights: WeightMap
) -> Assignment | None:
    """What the mapping comes to; None where there is none.

    Raises:
        MappingError: as `SparsityMapping.resolve`, or it masks nothing.
    """
    resolved = mapping_for(sparsifier, mapping)
    if resolved is None:
        return None
    assignment = resolved.resolve(weights)
    if not assignment:
        unmatched = f"; nothing matches {', '.join(assignment.unmatched)}"
        raise MappingError(
            "the mapping masks none of the weights "
            f"{', '.join(weights)}{unmatched if assignment.unmatched else ''}"
        )
    return assignment


@contextmanager
def _as_it_was_on_failure(sparsifier: BaseSparsifier) -> Iterator[None]:
    """Let a sparsifier that was fresh be fresh again where the flow does not come to its end."""
    before = copy.deepcopy(sparsifier.__getstate__())
    try:
        yield
    except BaseException:
        sparsifier.__setstate__(before)
        raise


def _mask_prepared(
    prepared: Prepared,
    sparsifier: BaseSparsifier,
    weights: WeightMap,
    configs: Mapping[str, SparsityConfig] | None,
    run: Calibrate,
) -> SparsityRecord:
    """Mask a prepared model, run it to calibrate or train it, and bake the masks in."""
    there = {fqn: prepared.moved.get(fqn, fqn) for fqn in weights}
    if configs is not None:
        configs = {there[fqn]: config for fqn, config in configs.items()}
    mask_weights(prepared.model, sparsifier, weights.renamed(prepared.moved), configs)
    sparsifier.step()
    run(prepared.model)
    _, record = squash(prepared.model, sparsifier)
    return SparsityRecord(
        {
            fqn: replace(record[name], aliases=weights[fqn].aliases)
            for fqn, name in there.items()
            if name in record
        }
    )


def sparsify_codes(
    model: nn.Module,
    sparsifier: BaseSparsifier,
    weights: WeightMap,
    mapping: MappingLike | None = None,
) -> SparsityRecord:
    """Mask a quantized model: rank what its codes stand for, write the code that means zero.

    Scales, zero points and every kept code stay as they are.

    Whatever is raised, the model was not changed.

    Args:
        model: quantized by one of the backends; changed in place.
        sparsifier: a fresh one; it is bound to the dequantized weights.
        weights: what discovery found in the float model.
        mapping: which weight gets which pattern and level; None is the sparsifier's defaults.

    Returns:
        The record of the masks.

    Raises:
        MappingError: as `prepare`.
        MaskError: as `prepare`; a float weight that a parametrization computes; or one that the
            quantized model does not hold any more, or not in a form that can be read.
        ZeroNotRepresentableError: a weight has no code that means zero.
    """
    configs = _resolve(sparsifier, mapping, weights)
    names = {fqn: weights[fqn].aliases for fqn in (weights if configs is None else configs)}
    stored = by_name(read_weights(model), names)
    for copies in stored.values():
        for weight in copies:
            weight.zero_code()
            if weight.obstacle:
                raise MaskError(f"{weight.fqn} cannot be masked: {weight.obstacle}")
            if weight.computed:
                raise MaskError(
                    f"{weight.fqn} was left in float, and is computed by {weight.computed}; "
                    "remove that, exclude the weight, or sparsify first"
                )
    if missing := [fqn for fqn, copies in stored.items() if not copies]:
        raise MaskError(
            f"the quantized model does not hold {', '.join(missing)} (they were combined, or are "
            "gone); exclude them, or sparsify first"
        )

    ranked = _skeleton({fqn: _assemble(fqn, copies) for fqn, copies in stored.items()})
    entries = [
        {
            "tensor_fqn": fqn,
            "roles": weights[fqn].roles,
            **({} if configs is None else group_entry(configs[fqn])),
        }
        for fqn in stored
    ]
    sparsifier.prepare(ranked, entries)
    sparsifier.step()
    record = SparsityRecord.of(sparsifier, {fqn: weights[fqn].aliases for fqn in stored})
    for fqn, copies in stored.items():
        for weight in copies:
            weight.set_zero(record[fqn].keep)
    return record


def _assemble(fqn: str, copies: Sequence[StoredWeight]) -> Tensor:
    """What the codes of a weight stand for, in its own shape, from parts where it was split.

    Raises:
        MaskError: the parts do not make up the whole.
    """
    whole = next((weight for weight in copies if weight.view is None), None)
    if whole is not None:
        return whole.dequantize().detach().clone()
    view = copies[0].view
    assert view is not None
    values = torch.zeros(view.shape)
    covered = torch.zeros(view.shape, dtype=torch.bool)
    for part in copies:
        part.put(values, part.dequantize())
        part.put(covered, torch.ones_like(part.data, dtype=torch.bool))
    if not bool(covered.all()):
        raise MaskError(
            f"{fqn}: the quantized model stores only {int(covered.count_nonzero())} of its "
            f"{covered.numel()} elements"
        )
    return values


def _skeleton(tensors: dict[str, Tensor]) -> nn.Module:
    """A module tree that holds tensors under the FQNs of the model that they came from."""
    root = nn.Module()
    for fqn, tensor in tensors.items():
        module = root
        *path, attribute = fqn.split(".")
        for name in path:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.register_parameter(attribute, nn.Parameter(tensor.contiguous(), requires_grad=False))
    return root
