"""`torch.ao.quantization` in eager mode: dynamic int8 linears and weight-only 8-bit embeddings.

Deprecated in torch, and still what many have. Its embeddings are the only modules whose weights
lose their zeros; the observer below is the cure.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from fx_sparsity.graph import WeightMap
from fx_sparsity.graph.capture import ExampleInputs
from fx_sparsity.quantization.backend import (
    Backend,
    BackendError,
    Calibrate,
    Quantized,
    run_example,
)
from fx_sparsity.quantization.embeddings import (
    bake_max_norm,
    check_quantizable,
    match_float_forward,
)
from fx_sparsity.quantization.observers import (
    EMBEDDING_SPEC,
    FarRowsAlone,
    IntegerZeroPoint,
)
from fx_sparsity.quantization.stored import StoredWeight
from fx_sparsity.sparsifier import Mask

QConfigs = Mapping[type[nn.Module], tq.QConfig]


class EmbeddingObserver(IntegerZeroPoint, PerChannelMinMaxObserver):  # type: ignore[misc]
    """Observes embedding rows so that zero is a code."""


class FarRowsAloneObserver(FarRowsAlone, PerChannelMinMaxObserver):  # type: ignore[misc]
    """Observes embedding rows so that zero is a code in those that span it."""


embedding_qconfig = tq.QConfig(
    activation=tq.PlaceholderObserver.with_args(dtype=torch.float),
    weight=EmbeddingObserver.with_args(dtype=torch.quint8, **EMBEDDING_SPEC),
)
"""Weight-only 8-bit embeddings; `float_qparams_weight_only_qconfig` with a zero that is a code."""

far_rows_alone_qconfig = embedding_qconfig._replace(
    weight=FarRowsAloneObserver.with_args(dtype=torch.quint8, **EMBEDDING_SPEC)
)
"""The same, but rows whose values are all of one sign are quantized as torch does."""

DEFAULT_QCONFIGS: QConfigs = {
    nn.Linear: tq.per_channel_dynamic_qconfig,
    nn.Embedding: embedding_qconfig,
    nn.EmbeddingBag: embedding_qconfig,
}


class EagerBackend(Backend):
    """`quantize_dynamic`. `config` maps module classes to qconfigs; None is `DEFAULT_QCONFIGS`."""

    name = "eager"

    def quantize(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weights: WeightMap,
        *,
        calibrate: Calibrate | None = None,
        config: QConfigs | None = None,
        dynamic_shapes: Any = None,
    ) -> Quantized:
        """See `Backend.quantize`. Nothing here is calibrated or exported.

        Raises:
            BackendError: live masks, which torch would leave in float without a word; a bag that
                takes the maximum; or a result that does not run on the example inputs.
        """
        del calibrate, dynamic_shapes
        for name, module in model.named_modules():
            if isinstance(module, Mask):
                weight = name.partition(".parametrizations.")[0]
                raise BackendError(f"{weight} is still masked; squash before quantizing")
        qconfigs = dict(config or DEFAULT_QCONFIGS)
        copied = copy.deepcopy(model)
        names: dict[nn.Module, list[str]] = {}
        for name, module in copied.named_modules(remove_duplicate=False):
            if type(module) in qconfigs:
                names.setdefault(module, []).append(name)
        for source in names:
            if isinstance(source, nn.Embedding | nn.EmbeddingBag):
                check_quantizable(names[source][0], source)
                bake_max_norm(source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.ao.quantization is deprecated.*")
            quantized = tq.quantize_dynamic(copied, qconfigs, inplace=True)
        for source, aliases in names.items():
            module = quantized.get_submodule(aliases[0])
            if isinstance(source, nn.Embedding | nn.EmbeddingBag):
                match_float_forward(module, source)
            for alias in aliases[1:]:  # torch converts a shared module once for some of its names
                quantized.set_submodule(alias, module)
        try:
            with torch.no_grad():
                run_example(quantized, example_inputs)
        except Exception as error:
            raise BackendError(
                f"the quantized {type(model).__name__} does not run on example_inputs: "
                f"{type(error).__name__}: {error}; exclude the modules concerned in `config`, "
                "or use backend 'pt2e'"
            ) from error
        held = {f"{name}.weight".removeprefix(".") for found in names.values() for name in found}
        meant = frozenset(fqn for fqn, site in weights.items() if held & {fqn, *site.aliases})
        return Quantized(quantized, meant)


def read_modules(model: nn.Module) -> Iterator[StoredWeight]:
    """Weights of torch's quantized modules, a shared module under each of its names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nnq.Linear | nnq.Conv2d | nnq.Conv1d | nnq.Conv3d | nnq.Embedding):
            yield read_quantized(f"{name}.weight".removeprefix("."), module)


def read_quantized(fqn: str, module: Any) -> StoredWeight:
    """The weight of one of torch's quantized modules, under the name `fqn`."""
    weight: Tensor = module.weight()
    codes = weight.int_repr()
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scheme = "per-tensor affine"
        scale = torch.tensor(weight.q_scale())
        zero_point = torch.tensor(weight.q_zero_point())
    else:
        axis = weight.q_per_channel_axis()
        kind = "float" if "float" in str(weight.qscheme()) else "integer"
        scheme = f"per-channel affine ({kind} zero point), axis {axis}"
        shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        # Cloned, because an unpacked embedding's parameters point into the packed weight, which is
        # gone once that is rebuilt.
        scales = weight.q_per_channel_scales().clone()
        zero_points = weight.q_per_channel_zero_points().clone()
        scale, zero_point = scales.float().view(shape), zero_points.view(shape)

    def write(new: Tensor) -> None:
        # Packed weights cannot be edited, only rebuilt. Requantizing what the codes stand for, with
        # their own scales, gives the same codes; anything else would be a defect of torch.
        values = (new.to(torch.float32) - zero_point) * scale
        if scheme.startswith("per-tensor"):
            rebuilt = torch.quantize_per_tensor(
                values, weight.q_scale(), weight.q_zero_point(), weight.dtype
            )
        else:
            rebuilt = torch.quantize_per_channel(values, scales, zero_points, axis, weight.dtype)
        if not torch.equal(rebuilt.int_repr(), new):
            raise RuntimeError(f"{fqn}: requantizing with its own scales changed other codes")
        if isinstance(module, nnq.Embedding):
            module.set_weight(rebuilt)
        else:
            module.set_weight_bias(rebuilt, module.bias())

    info = torch.iinfo(codes.dtype)
    dtype = str(weight.dtype).removeprefix("torch.")
    return StoredWeight(
        fqn, fqn, dtype, scheme, codes, write, scale, zero_point, (info.min, info.max)
    )
