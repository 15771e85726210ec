"""A linear layer whose weight is packed."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fx_sparsity.kernels import group_scales
from fx_sparsity.kernels.activations import ACTIVATIONS, QUANTIZERS
from fx_sparsity.kernels.ops import expect_input, linear_operator
from fx_sparsity.kernels.packed_module import PackedModule
from fx_sparsity.kernels.packings import INT4, PACKINGS, Packing, PackingError


class SparseLinear(PackedModule):
    """A linear layer for inference that keeps and multiplies only what is not zero.

    Made by `from_dense`. The packed weight lies in buffers named after the packing's parts; what
    `load_state_dict` brings is checked before it replaces them, and may have other zeros.
    Activations must have the dtype of the weight, or, where that is int8 or float8, be fp32 or
    bf16.

    Attributes:
        in_features: size of the last dimension of the activations.
        out_features: size of the last dimension of the result.
        packing: a key of `PACKINGS`.
        weight_dtype: of the weight: fp32, bf16 or int8, 4-bit codes being int8 as well; on CUDA
            fp16 and float8, too.
        quantize_input: one of "none" (activations as they are), for int8 weights
            "token_symmetric", "token_affine" and "tensor_affine", and for float8 weights, which
            have no other, "token_float8"; see `activations.quantize`.
        activation: one of "none", "relu", "gelu", "gelu_tanh", "silu".
        scale: fp32 [out], one a row of int8 or float8 codes; of packings of 4-bit codes [panels,
            groups, 16], see `group_scales`; else None.
        bias: [out], or None.
    """

    scale: Tensor | None
    row_sums: Tensor | None

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        shape: torch.Size,
        weight_dtype: torch.dtype,
        bias: Tensor | None,
        *,
        packing: str,
        scale: Tensor | None,
        row_sums: Tensor | None,
        quantize_input: str,
        activation: str,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.packing = packing
        self.weight_dtype = weight_dtype
        self.quantize_input = quantize_input
        self.activation = activation
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.register_buffer("scale", scale)
        self.register_buffer("row_sums", row_sums)
        if bias is not None:  # inference tensors take no such flag outside inference mode
            wanted = bias.requires_grad and not bias.is_inference()
            bias = nn.Parameter(bias, requires_grad=wanted)
        self.bias = bias
        self._settle()

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        packing: str,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        quantize_input: str = "none",
        activation: str = "none",
    ) -> Self:
        """Pack a dense weight.

        Args:
            weight: [out, in], fp32, bf16, or int8 codes whose zero is 0; on CUDA fp16, or float8
                codes, too.
            bias: [out], or None.
            packing: a key of `PACKINGS`.
            scale: [out], what each row's codes are multiplied by; for codes only. [out, groups]
                for packings of 4-bit codes, by equal groups of a multiple of 8 inputs.
            zero_point: int8 [out, groups], what was taken off 4-bit codes so that 0 is zero: they
                are stored with it. None where that was nothing.
            quantize_input: how activations are quantized for codes.
            activation: applied to the result.

        Raises:
            ValueError: an option is unknown, options do not fit each other, or a shape is wrong.
            PackingError: the packing refuses the weight.
        """
        _expect_one_of("packing", packing, PACKINGS)
        _expect_one_of("quantize_input", quantize_input, ("none", *QUANTIZERS))
        _expect_one_of("activation", activation, ACTIVATIONS)
        weight = weight.detach()
        for name, vector in (("bias", bias), ("scale", scale)):
            grouped = name == "scale" and packing in INT4 and vector is not None
            if vector is not None and not grouped and vector.shape != weight.shape[:1]:
                raise ValueError(
                    f"{name} is {list(vector.shape)}, expected [{weight.shape[0]}], one an output"
                )
            if vector is not None and vector.device != weight.device:
                raise ValueError(f"{name} is on {vector.device}, the weight on {weight.device}")
        if packing in INT4:
            return cls._from_int4(
                weight, bias, packing, scale, zero_point, quantize_input, activation
            )
        if zero_point is not None:
            raise ValueError(f"packing {packing!r} takes no zero points, only {', '.join(INT4)} do")
        if reason := PACKINGS[packing].refusal(weight):
            raise PackingError(f"{packing}: {reason}")
        coded = weight.dtype in QUANTIZERS.values()
        if coded != (scale is not None):
            raise ValueError(f"a {weight.dtype} weight {'needs a' if coded else 'takes no'} scale")
        codes = QUANTIZERS.get(quantize_input)
        if codes not in (None, weight.dtype):
            raise ValueError(
                f"quantize_input={quantize_input!r} needs a {codes} weight, found {weight.dtype}"
            )
        if codes is None and weight.dtype == torch.float8_e4m3fn:
            raise ValueError("a float8 weight needs quantize_input='token_float8', found 'none'")
        return cls(
            PACKINGS[packing].pack(weight),
            weight.shape,
            weight.dtype,
            bias,
            packing=packing,
            scale=None if scale is None else scale.detach().float().contiguous(),
            row_sums=weight.sum(1, dtype=torch.int32) if codes == torch.int8 else None,
            quantize_input=quantize_input,
            activation=activation,
        )

    @classmethod
    def _from_int4(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        packing: str,
        scale: Tensor | None,
        zero_point: Tensor | None,
        quantize_input: str,
        activation: str,
    ) -> Self:
        """See `from_dense`."""
        if scale is None:
            raise ValueError("4-bit codes need a scale")
        if QUANTIZERS.get(quantize_input) not in (None, torch.int8):
            raise ValueError(f"4-bit codes do not go with quantize_input={quantize_input!r}")
        by_output = scale.detach().view(len(scale), -1)
        if reason := group_scales.refusal(by_output, weight.shape):
            raise ValueError(reason)
        if zero_point is not None and zero_point.shape != by_output.shape:
            raise ValueError(
                f"zero points are {list(zero_point.shape)}, scales {list(by_output.shape)}"
            )
        if reason := INT4[packing].refusal(weight, zero_point):
            raise PackingError(f"{packing}: {reason}")
        quantized = quantize_input != "none"
        return cls(
            INT4[packing].pack(weight, zero_point),
            weight.shape,
            weight.dtype,
            bias,
            packing=packing,
            scale=group_scales.to_panels(group_scales.narrowed(by_output)),
            row_sums=group_scales.weighted_sums(weight, by_output) if quantized else None,
            quantize_input=quantize_input,
            activation=activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x; of sparse activations a dense result.

        Raises:
            TypeError: x has a dtype that does not go with the weight's.
            ValueError: its last dimension is not `in_features`, or it lies on another device.
        """
        if x.layout is not torch.strided:
            x = x.to_dense()
        expect_input(x, self.in_features)
        packing, held, bias = self._packing, self._buffers, self.bias
        if x.dtype != self.weight_dtype and held["scale"] is None:
            raise TypeError(f"activations are {x.dtype}, the weight is {self.weight_dtype}")
        # Straight from the dictionary: at one token, looking attributes up takes longer than a
        # tenth of the product.
        parts = [held[name] for name in packing.parts]
        if x.device != parts[0].device:  # type: ignore[union-attr]
            raise ValueError(f"activations are on {x.device}, the weight is on {self._device}")
        return linear_operator(packing)(
            x,
            *parts,
            held["scale"],
            held["row_sums"],
            None if bias is None else bias.to(x.dtype),
            self.in_features,
            self.out_features,
            self.quantize_input,
            self.activation,
        )

    def parts(self) -> dict[str, Tensor]:
        """The packed weight by the names of its packing's parts."""
        return {name: getattr(self, name) for name in self._packing.parts}

    def check(self) -> None:
        """See `PackedModule.check`."""
        if self._device.type == "meta":
            return
        self._expect_parts(self.parts(), self.scale, self.row_sums)

    def dense_codes(self) -> Tensor:
        """The weight as it was packed, [out, in], in `weight_dtype`; +0.0 for what was zero."""
        return self._packing.unpack(self.parts(), self._shape, self.weight_dtype)

    def dense_weight(self) -> Tensor:
        """What the layer multiplies by, [out, in]: floats, or codes times their scale in fp32."""
        codes = self.dense_codes()
        if self.scale is None:
            return codes
        return codes.float() * group_scales.expanded(self.scale, self._shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight with its scales, without the bias."""
        tensors = [*self.parts().values(), self.scale, self.row_sums]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def extra_repr(self) -> str:
        """Shape, packing, dtype and what is applied."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, packing={self.packing!r}, "
            f"weight_dtype={self.weight_dtype}, quantize_input={self.quantize_input!r}, "
            f"activation={self.activation!r}"
        )

    @property
    def _packing(self) -> Packing:
        return PACKINGS[self.packing]

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parts().values())).device

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def _expect_parts(
        self, parts: Mapping[str, Tensor], scale: Tensor | None, row_sums: Tensor | None
    ) -> None:
        """Raise PackingError unless a kernel can read them, and they go together."""
        self._packing.check(parts, self._shape, self.weight_dtype)
        grouped = self.packing in INT4
        if grouped and scale is not None:
            group_scales.check(scale, parts["zero_points"], self._shape)
        if row_sums is None or row_sums.is_meta:
            return
        codes = self._packing.unpack(parts, self._shape, self.weight_dtype)
        if not grouped:
            agree = torch.equal(codes.sum(1, dtype=torch.int32), row_sums)
        else:
            assert scale is not None
            by_output = group_scales.from_panels(scale, self.out_features)
            agree = torch.allclose(group_scales.weighted_sums(codes, by_output), row_sums)
        if not agree:
            raise PackingError("row_sums are not the sums of the packed codes")

    def _expect_state(self, own: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
        """Raise PackingError unless `found`, all or some of the buffers, go with the others."""
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise PackingError(f"{name} is a {type(value).__name__}, expected a tensor")
        rest = {**own, **found}
        scale, row_sums = (rest.pop(name, None) for name in ("scale", "row_sums"))
        try:
            self._expect_parts(rest, scale, row_sums)
        except PackingError as error:
            if missing := own.keys() - found.keys():
                raise PackingError(
                    f"{error}; the state has no {', '.join(sorted(missing))}"
                ) from error
            raise

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Check the parts, then let them in: they are as long as there are non-zeros."""
        own = {name: held for name, held in self._buffers.items() if held is not None}
        found = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        if found:
            try:
                self._expect_state(own, found)
            except PackingError as error:
                rest[-1].append(f"{prefix[:-1] or 'SparseLinear'}: {error}")
                return
            resized = (*self._packing.parts, *(["scale"] if self.packing in INT4 else []))
            for name in found.keys() & {*resized}:
                held, part = own[name], found[name]
                if held.shape != part.shape or held.dtype != part.dtype:
                    setattr(self, name, held.new_empty(part.shape, dtype=part.dtype))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; a weight of another dtype lies otherwise and is packed anew."""
        like = fn(torch.empty(0, dtype=self.weight_dtype, device=self._device))
        parts = None
        coded = self.scale is not None
        if like.dtype != self.weight_dtype and not coded:
            weight = self.dense_codes().to(like)
            if reason := self._packing.refusal(weight):
                raise PackingError(f"{self.packing}: {reason}")
            parts = self._packing.pack(weight)
        held = dict(self._buffers) if coded else {}
        super()._apply(fn, recurse)
        for name, buffer in held.items():  # codes and their scale keep their dtypes
            if buffer is not None and buffer.dtype != getattr(self, name).dtype:
                setattr(self, name, buffer.to(like.device))
        if parts is not None:
            self.weight_dtype = like.dtype
            for name, part in parts.items():
                setattr(self, name, part)
            self._settle()
        return self


def _expect_one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
