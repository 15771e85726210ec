"""torch.ao's quantized modules, which eager mode and FX graph mode have in common."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
from torch import Tensor, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.quantization import QConfig, QuantWrapper

from fx_sparsity.patterns import Role
from fx_sparsity.quantization.backend import BackendError
from fx_sparsity.quantization.codes import CodedWeight
from fx_sparsity.verification.read import WRAPPERS, own_forward
from fx_sparsity.verification.stored import StoredWeight, float_weight

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
_RECURRENT = (nnqd.LSTM, nnqd.GRU, nnqd.LSTMCell, nnqd.GRUCell, nnqd.RNNCell)
"""Modules with several packed weights."""
_WITH_NORM = (
    nni.ConvBn1d,
    nni.ConvBn2d,
    nni.ConvBn3d,
    nni.ConvBnReLU1d,
    nni.ConvBnReLU2d,
    nni.ConvBnReLU3d,
    nni.LinearBn1d,
)
"""What `fuse_modules_qat` makes."""


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


def quantizes(qconfig: QConfig) -> bool:
    """Whether weights become integer codes, and not float16."""
    return not qconfig.weight().dtype.is_floating_point


def fused_owner(module: nn.Module) -> nn.Module | None:
    """Of modules that were fused beforehand, the one that holds the weight; None of all others."""
    fused = type(module).__module__.startswith(f"{nni.__name__}.modules.")
    return module[0] if isinstance(module, nn.Sequential) and fused else None


def check_fused(name: str, module: nn.Module) -> None:
    """Raise if a module was fused with its batch norm, to be trained.

    Raises:
        BackendError: its weight is not the one that is quantized, which has the norm folded in.
    """
    if isinstance(module, _WITH_NORM):
        raise BackendError(
            f"{name}: expected a model that is not fused yet, found a {type(module).__name__}, "
            "which torch.ao.quantization.fuse_modules_qat made; leave that step out, or call "
            "fuse_modules on the model in eval mode instead"
        )


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
        if isinstance(module, _RECURRENT):
            for attribute, weight in module.get_weight().items():
                fqn = f"{path}.{attribute}".removeprefix(".")
                rebuild = functools.partial(_put_recurrent, module, attribute)
                yield read_affine(fqn, fqn, weight, rebuild, ("out", "in"))
            continue
        roles = next((axes for kind, axes in _KINDS.items() if isinstance(module, kind)), None)
        if roles is not None:
            yield _read_module(fqn, f"{name}.weight".removeprefix("."), module, roles)


def _put_recurrent(module: Any, attribute: str, new: Tensor) -> None:
    """Pack one of a recurrent module's weights anew, and the others with it."""
    weights, biases = {**module.get_weight(), attribute: new}, module.get_bias()
    # Layers want them together, cells apart.
    module.set_weight_bias({**weights, **biases, "weight": weights, "bias": biases})


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
    stored = read_affine(fqn, where, weight, rebuild, roles[: weight.ndim], aliases)
    if not type(module).forward.__module__.startswith("torch.ao."):
        return replace(stored, obstacle=own_forward(module))
    return stored


def unreadable(fqn: str, where: str, kind: str, shape: tuple[int, ...]) -> StoredWeight:
    """A quantized weight of which nothing but its shape is known.

    Args:
        fqn: name of the weight in the float model.
        where: what stores it.
        kind: of what stores it, for messages.
        shape: of the weight.
    """

    def refuse(values: Tensor) -> None:
        raise BackendError(f"{fqn}: codes of a {kind} cannot be written")

    return StoredWeight(
        fqn,
        where,
        kind,
        "layout of its own",
        torch.full((), torch.nan).expand(shape),
        refuse,
        scale=torch.ones(()),
        zero_point=torch.zeros(()),
        obstacle=f"codes of a {kind} cannot be read",
    )


def _codes_of(weight: Tensor) -> Tensor:
    """One integer an element, of the shape of a quantized tensor."""
    if weight.dtype != torch.quint4x2:
        return weight.int_repr()
    # Two in a byte, the first in its lower half, and no padding between rows.
    packed = weight.int_repr()
    pairs = torch.stack((packed & 15, packed >> 4), -1)
    return pairs.flatten()[: weight.numel()].view(weight.shape)


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
        weight: a quantized tensor of torch's own kind, unpacked; or a float one, which kernels for
            float16 give back.
        rebuild: packs another such tensor in its place.
        roles: of its axes.
        aliases: what else it may have been called.
    """
    if not weight.is_quantized:
        stored = float_weight(fqn, where, weight.to(torch.float16))
        return replace(stored, write=rebuild, roles=roles, aliases=aliases)
    codes = _codes_of(weight)
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
        if not torch.equal(_codes_of(rebuilt), new):
            raise RuntimeError(f"{fqn}: requantizing with its own scales changed other codes")
        rebuild(rebuilt)

    info = torch.iinfo(codes.dtype)
    code_range = (0, 15) if weight.dtype == torch.quint4x2 else (info.min, info.max)
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
        code_range,
        roles=roles,
        aliases=aliases,
    )


def _wraps(module: nn.Module, child: str) -> bool:
    """Whether torch.ao put `module` around a child: as a stub, or by fusing what follows it."""
    return isinstance(module, QuantWrapper) or (isinstance(module, _FusedModule) and child == "0")


WRAPPERS.append(_wraps)
