"""torch.ao's quantized modules, which eager mode and FX graph mode have in common."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QuantWrapper

from fx_sparsity.patterns import Role
from fx_sparsity.quantization.backend import BackendError
from fx_sparsity.quantization.codes import CodedWeight
from fx_sparsity.quantization.stored import StoredWeight

_CONV: tuple[Role, ...] = ("out", "in", "kernel", "kernel", "kernel")
_CONV_TRANSPOSED: tuple[Role, ...] = ("in", "out", "kernel", "kernel", "kernel")
_KINDS: dict[type[nn.Module], tuple[Role, ...]] = {
    nnq.Linear: ("out", "in"),
    nnq.Embedding: ("row", "dim"),
    nnq.Conv1d: _CONV,
    nnq.Conv2d: _CONV,
    nnq.Conv3d: _CONV,
    nnq.ConvTranspose1d: _CONV_TRANSPOSED,
    nnq.ConvTranspose2d: _CONV_TRANSPOSED,
    nnq.ConvTranspose3d: _CONV_TRANSPOSED,
}
"""Modules with one packed weight -> roles of its axes."""
_FUSED = (
    nniq.LinearReLU,
    nniq.ConvReLU1d,
    nniq.ConvReLU2d,
    nniq.ConvReLU3d,
    nniqd.LinearReLU,
)
"""Those of them that were a sequence in float, and held the weight in its first member."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's notice, at every turn, that this kind of quantization is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.ao.quantization is deprecated.*")
        yield


def check_engine() -> None:
    """Raise if torch was built without quantized kernels.

    Raises:
        BackendError: no engine is chosen.
    """
    if torch.backends.quantized.engine in (None, "none"):
        raise BackendError(
            "torch.backends.quantized.engine: expected one of "
            f"{', '.join(e for e in torch.backends.quantized.supported_engines if e != 'none')}, "
            "found none; choose one that this build of torch supports, or use backend 'torchao'"
        )


def is_dynamic(qconfig: QConfig) -> bool:
    """Whether activations are quantized as they come, so that nothing is to be calibrated."""
    return bool(getattr(qconfig.activation(), "is_dynamic", False))


def read_modules(model: nn.Module) -> Iterator[StoredWeight]:
    """Weights of quantized modules, a shared module under each of its names."""
    wrappers = {
        f"{name}.module".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantWrapper)
    }
    for name, module in model.named_modules(remove_duplicate=False):
        path = name.rpartition(".")[0] if name in wrappers else name
        fqn = f"{path}.weight".removeprefix(".")
        if isinstance(module, CodedWeight):
            yield replace(
                module._weight_codes.stored(fqn), where=f"{name}.weight".removeprefix(".")
            )
            continue
        roles = next((axes for kind, axes in _KINDS.items() if isinstance(module, kind)), None)
        if roles is not None:
            yield _read_module(fqn, f"{name}.weight".removeprefix("."), module, roles)


def read_quantized(fqn: str, module: nn.Module) -> StoredWeight:
    """The weight of one of torch's quantized modules, under the name `fqn`."""
    roles = next(axes for kind, axes in _KINDS.items() if isinstance(module, kind))
    return _read_module(fqn, fqn, module, roles)


def _read_module(fqn: str, where: str, module: nn.Module, roles: tuple[Role, ...]) -> StoredWeight:
    packed: Any = module

    def rebuild(new: Tensor) -> None:
        if isinstance(module, nnq.Embedding):
            module.set_weight(new)
        else:
            packed.set_weight_bias(new, packed.bias())

    weight: Tensor = packed.weight()
    aliases = (f"{fqn.removesuffix('weight')}0.weight",) if isinstance(module, _FUSED) else ()
    return read_affine(fqn, where, weight, rebuild, roles[: weight.ndim], aliases)


def read_affine(
    fqn: str,
    where: str,
    weight: Tensor,
    rebuild: Callable[[Tensor], None],
    roles: tuple[Role, ...] | None = None,
    aliases: tuple[str, ...] = (),
) -> StoredWeight:
    """A weight that torch packs for its kernels, and that cannot be edited, only built anew.

    Args:
        fqn: name of the weight in the float model.
        where: what stores it.
        weight: a quantized tensor of torch's own kind, unpacked.
        rebuild: packs another such tensor in its place.
        roles: of its axes.
        aliases: what else it may have been called.
    """
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
        # Requantizing what the codes stand for, with their own scales, gives the same codes;
        # anything else would be a defect of torch.
        values = (new.to(torch.float32) - zero_point) * scale
        if scheme.startswith("per-tensor"):
            rebuilt = torch.quantize_per_tensor(
                values, weight.q_scale(), weight.q_zero_point(), weight.dtype
            )
        else:
            rebuilt = torch.quantize_per_channel(values, scales, zero_points, axis, weight.dtype)
        if not torch.equal(rebuilt.int_repr(), new):
            raise RuntimeError(f"{fqn}: requantizing with its own scales changed other codes")
        rebuild(rebuilt)

    info = torch.iinfo(codes.dtype)
    dtype = str(weight.dtype).removeprefix("torch.")
    return StoredWeight(
        fqn,
        where,
        dtype,
        scheme,
        codes,
        write,
        scale,
        zero_point,
        (info.min, info.max),
        roles=roles,
        aliases=aliases,
    )
