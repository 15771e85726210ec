"""The modules that lowering replaces, and how each kind holds its weight: one class a kind."""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized.dynamic as nnqd
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from fx_sparsity.kernels import group_scales, int4
from fx_sparsity.kernels.activations import QUANTIZERS
from fx_sparsity.kernels.packings import INT4, PACKINGS
from fx_sparsity.kernels.semi_structured import SemiStructuredPacking
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.patterns import Role
from fx_sparsity.quantization.torch_ao.embeddings import FORWARD_HOOKS
from fx_sparsity.quantization.torch_ao.modules import read_quantized
from fx_sparsity.quantization.torchao_tensors import is_torchao


@dataclass(frozen=True)
class DenseLinear:
    """A linear layer, however a model holds it.

    Attributes:
        weight: [out, in]: floating, or int8 or float8 codes of which 0 means zero.
        bias: [out], or None.
        scale: of the codes, float32 [out], or [out, groups] of codes of 4 bits; None where the
            weight is floating.
        zero_point: int8 [out, groups], what was taken off 4-bit codes; None where nothing was.
        quantize_input: how its activations are quantized, as `SparseLinear.from_dense` takes it.
        activation: that the layer applies to its result, as `SparseLinear.from_dense` takes it.
        input_dtype: of the activations, as far as the weight tells.
        from_codes: whether the model quantizes and dequantizes its activations: a dense model that
            is compiled and frozen multiplies their codes.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    quantize_input: str = "none"
    activation: str = "none"
    input_dtype: torch.dtype = torch.float32
    from_codes: bool = False
    zero_point: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of the weight with its scales and zero points."""
        tensors = (self.weight, self.scale, self.zero_point)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def in_groups(self) -> bool:
        """Whether its scales are those of groups of inputs, as 4-bit codes have them."""
        return self.scale is not None and self.scale.dim() == 2

    @property
    def density(self) -> float:
        """Share of values that are not zero."""
        count = self.weight.numel()
        return int((~self.zeros).count_nonzero()) / count if count else 0.0

    @property
    def zeros(self) -> Tensor:
        """Boolean, [out, in]: what is zero."""
        return self.weight == 0

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the axes of the weight."""
        return "out", "in"

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.weight.device

    @property
    def dtype(self) -> str:
        """Of the weight, such as `float32`, or `int4 by 64`."""
        if self.in_groups:
            assert self.scale is not None
            return f"int4 by {self.shape[1] // self.scale.shape[1]}"
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def mode(self) -> str:
        """How activations of codes are quantized; empty for floating weights."""
        if self.scale is None:
            return ""
        return "codes" if self.from_codes else self.quantize_input

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether kernels take activations of that dtype."""
        if self.device.type == "cuda" and self.scale is None:
            return dtype == self.weight.dtype
        return dtype in (torch.float32, torch.bfloat16)

    def candidates(self) -> tuple[dict[str, LoweredLinear], list[str]]:
        """The layer in each packing that fits, by its name; and why others of its kind do not."""
        names = [name for name in PACKINGS if (name in INT4) == self.in_groups]
        refusals = {name: self.refusal(name) for name in names}
        fitting = {name: self.pack(name) for name, refusal in refusals.items() if refusal is None}
        return fitting, [f"{name}: {refusal}" for name, refusal in refusals.items() if refusal]

    def refusal(self, packing: str) -> str | None:
        """Why a packing cannot hold it, or has no kernel where it lies; None if it can."""
        if self.device.type == "cuda":
            if packing != SemiStructuredPacking.name:
                known = SemiStructuredPacking.name
                return f"no kernel for CUDA, where {known!r} is the packing of 2:4"
            if self.scale is not None and self.quantize_input == "none":
                return f"no kernel for weight-only {self.dtype}"
        if packing in INT4:
            return INT4[packing].refusal(self.weight, self.zero_point)
        if self.in_groups:
            return f"one scale an output is what it takes; for groups there are {', '.join(INT4)}"
        return PACKINGS[packing].refusal(self.weight)

    def pack(self, packing: str, tied: LoweredLinear | None = None) -> LoweredLinear:
        """The same layer with its weight packed.

        Args:
            packing: a key of `PACKINGS`.
            tied: a packed layer of the same weight and packing, whose parts are shared.

        Raises:
            PackingError: the packing refuses the weight.
        """
        if tied is None:
            return LoweredLinear.from_dense(
                self.weight,
                self.bias,
                packing=packing,
                scale=self.scale,
                zero_point=self.zero_point,
                quantize_input=self.quantize_input,
                activation=self.activation,
            )
        return LoweredLinear(
            tied.parts(),
            self.weight.shape,
            self.weight.dtype,
            self.bias,
            packing=packing,
            scale=tied.scale,
            row_sums=tied.row_sums,
            quantize_input=self.quantize_input,
            activation=self.activation,
        )

    @classmethod
    def unpack(cls, packed: LoweredLinear) -> "DenseLinear":
        """What `pack` was given: exact for every kept value, +0.0 for the others."""
        scale, zero_point = packed.scale, None
        if packed.packing in INT4:
            assert scale is not None
            outputs = packed.out_features
            scale = group_scales.from_panels(scale, outputs).float()
            zero_points = packed.parts()["zero_points"]
            if zero_points.numel():
                zero_point = group_scales.from_panels(zero_points, outputs)
        return cls(
            packed.dense_codes(),
            packed.bias,
            scale,
            packed.quantize_input,
            packed.activation,
            torch.float32 if packed.scale is not None else packed.weight_dtype,
            zero_point=zero_point,
        )


class Kind(ABC):
    """A kind of modules that hold one linear weight.

    Attributes:
        transposed: whether they store it as [in, out].
    """

    transposed: bool = False

    @abstractmethod
    def covers(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    @abstractmethod
    def read(self, module: Any) -> DenseLinear | str:
        """The layer that a module is; or, in words, why it cannot be replaced."""

    @abstractmethod
    def template(self, module: Any) -> Any:
        """What `restore` needs besides the layer; holds none of its tensors."""

    @abstractmethod
    def restore(self, template: Any, layer: DenseLinear) -> nn.Module:
        """A module like the one that was read, with the weight of `layer`."""


class FloatLinear(Kind):
    """`nn.Linear` with a plain weight."""

    def covers(self, module: nn.Module) -> bool:
        """See `Kind`."""
        return isinstance(module, nn.Linear) and not is_torchao(_raw_weight(module))

    def read(self, module: Any) -> DenseLinear | str:
        """See `Kind`."""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "its weight is read by the attention that owns it"
        if type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} has a forward of its own"
        return _float_layer(module.weight, module.bias)

    def template(self, module: Any) -> Any:
        """See `Kind`: the module without its parameters."""
        return _emptied(module)

    def restore(self, template: Any, layer: DenseLinear) -> nn.Module:
        """See `Kind`."""
        module = _emptied(template)
        tied = isinstance(layer.weight, nn.Parameter)
        module.weight = layer.weight if tied else nn.Parameter(layer.weight, requires_grad=False)
        module.bias = layer.bias
        return module


class TransposedLinear(FloatLinear):
    """The `Conv1D` of transformers: a linear layer whose weight is stored [in, out]."""

    transposed = True

    def covers(self, module: nn.Module) -> bool:
        """See `Kind`."""
        return _is_conv1d(module) and not is_torchao(_raw_weight(module))

    def read(self, module: Any) -> DenseLinear | str:
        """See `Kind`."""
        return _float_layer(module.weight.t().contiguous(), module.bias)

    def restore(self, template: Any, layer: DenseLinear) -> nn.Module:
        """See `Kind`."""
        return super().restore(template, replace(layer, weight=layer.weight.t().contiguous()))


class TorchAOLinear(FloatLinear):
    """`nn.Linear` whose weight is one of torchao's: 8 bits by outputs, or 4 bits by groups."""

    def covers(self, module: nn.Module) -> bool:
        """See `Kind`."""
        return isinstance(module, nn.Linear) and is_torchao(_raw_weight(module))

    def read(self, module: Any) -> DenseLinear | str:
        """See `Kind`."""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "its weight is read by the attention that owns it"
        if type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} has a forward of its own"
        layer = read_torchao(module.weight)
        return layer if isinstance(layer, str) else replace(layer, bias=module.bias)

    def template(self, module: Any) -> Any:
        """See `Kind`: the module, and the weight's description."""
        return super().template(module), describe_torchao(module.weight)

    def restore(self, template: Any, layer: DenseLinear) -> nn.Module:
        """See `Kind`."""
        module, description = template
        weight = restore_torchao(description, layer)
        return super().restore(module, replace(layer, weight=weight))


class TransposedTorchAOLinear(FloatLinear):
    """The `Conv1D` of transformers whose weight is 8-bit codes [in, out], one scale an output."""

    transposed = True

    def covers(self, module: nn.Module) -> bool:
        """See `Kind`."""
        return _is_conv1d(module) and is_torchao(_raw_weight(module))

    def read(self, module: Any) -> DenseLinear | str:
        """See `Kind`: others would be read as if they were [out, in]."""
        from torchao.quantization import Int8Tensor

        weight = module.weight
        if not isinstance(weight, Int8Tensor) or weight.zero_point is not None:
            return f"a {type(weight).__name__} has no kernel where it is stored [in, out]"
        layer = read_torchao(_turned(weight))
        return layer if isinstance(layer, str) else replace(layer, bias=module.bias)

    def template(self, module: Any) -> Any:
        """See `Kind`: the module, and the description of the weight as [out, in]."""
        return super().template(module), describe_torchao(_turned(module.weight))

    def restore(self, template: Any, layer: DenseLinear) -> nn.Module:
        """See `Kind`."""
        module, description = template
        weight = _turned(restore_torchao(description, layer))
        return super().restore(module, replace(layer, weight=weight))


class DynamicLinear(Kind):
    """torch.ao's dynamically quantized linear, as eager mode and FX graph mode make it."""

    def covers(self, module: nn.Module) -> bool:
        """See `Kind`."""
        return isinstance(module, nnqd.Linear)

    def read(self, module: Any) -> DenseLinear | str:
        """See `Kind`."""
        if type(module) not in (nnqd.Linear, nniqd.LinearReLU):
            return f"{type(module).__name__} has a forward of its own"
        stored = read_quantized("weight", module)
        if stored.scale is None or stored.zero_point is None or stored.dtype != "qint8":
            return f"weights of {stored.dtype} have no kernel"
        if bool(stored.zero_point.any()):
            return "zero points other than 0 have no kernel"
        return DenseLinear(
            stored.data,
            module.bias(),
            stored.scale.float().expand(len(stored.data), 1).flatten().contiguous(),
            "tensor_affine",
            "relu" if isinstance(module, nniqd.LinearReLU) else "none",
        )

    def template(self, module: Any) -> Any:
        """See `Kind`: class, quantization scheme and mode."""
        return type(module), module.weight().qscheme(), module.training

    def restore(self, template: Any, layer: DenseLinear) -> nn.Module:
        """See `Kind`."""
        kind, scheme, training = template
        assert layer.scale is not None
        outputs, inputs = layer.weight.shape
        zeros = torch.zeros(outputs, dtype=torch.int64)
        if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            weight = torch._make_per_tensor_quantized_tensor(layer.weight, float(layer.scale[0]), 0)
        else:
            weight = torch._make_per_channel_quantized_tensor(
                layer.weight, layer.scale.double(), zeros, 0
            )
        module = kind(inputs, outputs)
        module.set_weight_bias(weight, layer.bias)
        return module.train(training)


KINDS: Mapping[str, Kind] = {
    "linear": FloatLinear(),
    "transposed linear": TransposedLinear(),
    "torchao linear": TorchAOLinear(),
    "transposed torchao linear": TransposedTorchAOLinear(),
    "dynamic linear": DynamicLinear(),
}
"""A new kind of module is one entry."""


def kind_of(module: nn.Module) -> str | None:
    """Which of `KINDS` a module is; None for all others."""
    return next((name for name, kind in KINDS.items() if kind.covers(module)), None)


def read_module(module: nn.Module, kind: str) -> DenseLinear | str:
    """The layer that a module of a kind is; or, in words, why it cannot be replaced."""
    return KINDS[kind].read(module)


def computed_or_hooked(module: nn.Module) -> str:
    """Why a module of any kind cannot be replaced: it computes its weight, or has hooks."""
    if parametrize.is_parametrized(module):
        return "its weight is computed anew at each call"
    hooks = [hook for name in _HOOKS for hook in getattr(module, name).values()]
    # Kernels for tables do by themselves what these make of quantized modules.
    return "it has hooks" if any(hook not in FORWARD_HOOKS for hook in hooks) else ""


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def read_torchao(weight: Any) -> DenseLinear | str:
    """The layer, without its bias, whose weight is one of torchao's; or why it has no kernel."""
    from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor

    if isinstance(weight, IntxUnpackedToInt8Tensor):
        return _read_intx(weight)
    if not isinstance(weight, Int8Tensor | Float8Tensor):
        return f"a {type(weight).__name__} has no kernel"
    if weight.ndim != 2 or tuple(weight.scale.shape) != (len(weight), 1):
        return f"scales of shape {tuple(weight.scale.shape)} have no kernel, only one an output"
    in_float = isinstance(weight, Float8Tensor)
    if not in_float:
        if weight.zero_point is not None and bool(weight.zero_point.any()):
            return "zero points other than 0 have no kernel"
        if weight.act_pre_scale is not None or weight.act_quant_scale is not None:
            return "activations with static scales have no kernel"
    quantize_input = "none"
    if (kwargs := weight.act_quant_kwargs) is not None:
        found = _float8_quantizer(kwargs) if in_float else _int8_quantizer(kwargs)
        if found is None:
            return f"activations quantized by {kwargs} have no kernel"
        quantize_input = found
    scale = weight.scale.detach().float().flatten()
    codes = weight.qdata.detach()
    return DenseLinear(codes, None, scale, quantize_input, input_dtype=weight.dtype)


_INTX_INPUTS = {None: "none", "int8_asym_per_token": "token_affine"}
"""How torchao's `Intx` tensors say that activations are quantized -> one of `QUANTIZERS`."""


def _read_intx(weight: Any) -> DenseLinear | str:
    """See `read_torchao`: integers of up to 4 bits, an int8 each, with scales by groups."""
    if weight.ndim != 2 or weight.block_size[0] != 1:
        return f"scales of blocks {tuple(weight.block_size)} have no kernel"
    if weight.zero_point.is_floating_point():
        return "zero points that are no integers have no kernel"
    quantizer = _INTX_INPUTS.get(weight.activation_quantization)
    if quantizer is None:
        return f"activations quantized as {weight.activation_quantization} have no kernel"
    codes, scale = weight.qdata.detach(), weight.scale.detach().float()
    if refused := group_scales.refusal(scale, codes.shape):
        return refused
    zero_point: Tensor | None = weight.zero_point.detach().to(torch.int8)
    assert zero_point is not None
    if bool(zero_point.any()):
        offsets = group_scales.expanded(zero_point, codes.shape)
        if bool((codes.int() - offsets != codes - offsets).any()):
            return "codes differ from their zero points by more than 8 bits hold"
        codes = codes - offsets
    else:
        zero_point = None
    return DenseLinear(
        codes, None, scale, quantizer, input_dtype=weight.dtype, zero_point=zero_point
    )


def _int8_quantizer(kwargs: Any) -> str | None:
    """Which of `QUANTIZERS` torchao's arguments mean; None for those that have no kernel."""
    from torchao.quantization import PerRow
    from torchao.quantization.quant_primitives import MappingType

    if kwargs.reduce_range or not isinstance(kwargs.granularity, PerRow):
        return None
    symmetric = kwargs.mapping_type == MappingType.SYMMETRIC
    return "token_symmetric" if symmetric else "token_affine"


def _float8_quantizer(kwargs: Any) -> str | None:
    """See `_int8_quantizer`."""
    from torchao.quantization import PerRow

    bounded = kwargs.hp_value_lb is not None or kwargs.hp_value_ub is not None
    taken = kwargs.float8_dtype == QUANTIZERS["token_float8"]
    by_token = isinstance(kwargs.granularity, PerRow)
    return "token_float8" if taken and by_token and not bounded else None


def describe_torchao(weight: Any) -> tuple[Any, dict[str, Any]]:
    """What `restore_torchao` needs besides codes and scales."""
    optional = getattr(weight, "optional_tensor_attribute_names", ())
    names = (*weight.tensor_attribute_names, *optional)
    described = {name: getattr(weight, name) for name in names}
    if "zero_point" in weight.tensor_data_names:
        described["scale_dtype"] = weight.scale.dtype
        described["zero_point_dtype"] = weight.zero_point.dtype
    elif hasattr(weight, "zero_point"):
        described["zero_point"] = weight.zero_point
    return type(weight), described


def restore_torchao(description: tuple[Any, dict[str, Any]], layer: DenseLinear) -> Any:
    """One of torchao's tensors, as it was before it was lowered."""
    kind, described = description
    assert layer.scale is not None
    codes, scale = layer.weight, layer.scale.view(len(layer.weight), -1)
    if "scale_dtype" not in described:
        return kind(qdata=codes, scale=scale, **described)
    described = dict(described)
    dtypes = (described.pop("scale_dtype"), described.pop("zero_point_dtype"))
    zero_point = torch.zeros_like(scale) if layer.zero_point is None else layer.zero_point
    return kind(
        qdata=int4.codes_of(codes, layer.zero_point),
        scale=scale.to(dtypes[0]),
        zero_point=zero_point.to(dtypes[1]),
        **described,
    )


def _turned(weight: Any) -> Any:
    """An `Int8Tensor` without zero points, its two axes exchanged."""
    kind, described = describe_torchao(weight)
    described["block_size"] = described["block_size"][::-1]
    return kind(qdata=weight.qdata.t().contiguous(), scale=weight.scale.t(), **described)


def _is_conv1d(module: nn.Module) -> bool:
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and type(module) is utils.Conv1D


def _emptied(module: nn.Module) -> Any:
    """A copy without parameters."""
    copied = copy.copy(module)
    copied._parameters = dict.fromkeys(module._parameters)
    return copied


def _float_layer(weight: Tensor, bias: Tensor | None) -> DenseLinear:
    return DenseLinear(weight.detach(), bias, input_dtype=weight.dtype)


def _raw_weight(module: nn.Module) -> Any:
    """The parameter or buffer called `weight`, without computing anything."""
    return module._parameters.get("weight", module._buffers.get("weight"))
